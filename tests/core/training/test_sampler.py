"""The order of the pictures: each once in an epoch, only alike ones together, the same for the same seed."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.training.batches import largest_batch
from aclora_core.training.sampler import EpochSampler, epoch_steps, micro_batches, steps_per_epoch
from tests.support.toy import toy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everyone(groups: list) -> range:
    return range(len(groups))


groups = st.lists(st.sampled_from(["square", "wide", ("tall", 77)]), min_size=1, max_size=40)
sizes = st.integers(1, 9)


@given(groups, sizes, st.integers(0, 99))
def test_every_picture_comes_once_in_an_epoch(groups: list, size: int, seed: int) -> None:
    steps = epoch_steps(everyone(groups), groups, size, seeded(seed))
    assert sorted(itertools.chain(*steps)) == list(range(len(groups)))


@given(groups, sizes, st.integers(0, 99))
def test_every_step_is_full_but_one(groups: list, size: int, seed: int) -> None:
    """So every picture counts alike, also the only one of its size."""
    steps = epoch_steps(everyone(groups), groups, size, seeded(seed))
    assert len(steps) == steps_per_epoch(len(groups), size) == math.ceil(len(groups) / size)
    assert all(len(step) == size for step in sorted(steps, key=len)[1:])
    alone = sum(len({groups[number] for number in step}) == 1 and len(step) == size for step in steps)
    assert alone >= sum(count // size for count in Counter(groups).values())


@given(groups, sizes, sizes, st.integers(0, 9))
def test_what_goes_through_the_model_together_is_alike(groups: list, size: int, batch_size: int, seed: int) -> None:
    for step in epoch_steps(everyone(groups), groups, size, seeded(seed)):
        batches = micro_batches(step, groups, batch_size)
        assert sorted(itertools.chain(*batches)) == sorted(step)
        assert all(len({groups[number] for number in batch}) == 1 and len(batch) <= batch_size for batch in batches)
        if len({groups[number] for number in step}) == 1:
            assert len(batches) == math.ceil(len(step) / batch_size)
        else:  # few numbers of rows, since a graph is recorded for each
            assert all(len(batch) == batch_size or len(batch).bit_count() == 1 for batch in batches)


@given(groups, sizes, st.integers(1, 4))
def test_epochs_follow_each_other_and_say_when_they_end(groups: list, size: int, epochs: int) -> None:
    length = steps_per_epoch(len(groups), size)
    taken = list(itertools.islice(EpochSampler(everyone(groups), groups, size, seeded()), epochs * length))
    assert [epoch for epoch, _, _ in taken] == [1 + place // length for place in range(len(taken))]
    assert [ends for _, ends, _ in taken] == [(place + 1) % length == 0 for place in range(len(taken))]
    seen = Counter(number for _, _, batch in taken for number in batch)
    assert seen == dict.fromkeys(range(len(groups)), epochs)


def test_the_order_follows_the_seed_and_changes_from_epoch_to_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        return [batch for _, _, batch in itertools.islice(EpochSampler(range(20), [0] * 20, 4, seeded(seed)), 10)]

    assert epochs(1) == epochs(1) != epochs(2)
    assert epochs(1)[:5] != epochs(1)[5:]


def test_pictures_of_a_group_meet_others_and_groups_mix() -> None:
    groups = ["a"] * 8 + ["b"] * 8
    taken = [batch for _, _, batch in itertools.islice(EpochSampler(everyone(groups), groups, 2, seeded()), 400)]
    partners = {number for batch in taken if 3 in batch for number in batch} - {3}
    assert partners == {0, 1, 2, 4, 5, 6, 7}
    epochs = [[groups[batch[0]] for batch in taken[place : place + 8]] for place in range(0, 400, 8)]
    blocks = [sum(1 for _ in itertools.groupby(epoch)) for epoch in epochs]
    assert sum(blocks) / len(blocks) > 4  # 5 on average when mixed, 2 when one group follows the other


def test_a_batch_larger_than_the_dataset_takes_all_of_it() -> None:
    assert sorted(epoch_steps(range(3), ["x"] * 3, 100, seeded())[0]) == [0, 1, 2]
    assert steps_per_epoch(3, 100) == 1


def test_random_numbers_of_others_are_not_touched() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    epoch_steps(range(9), ["x"] * 9, 2, seeded(3))
    assert torch.rand(1) == pytest.approx(float(expected), abs=0)


def test_only_the_pictures_that_were_named_take_part() -> None:
    groups = ["a", "b"] * 6
    named = [1, 2, 5, 8, 9]
    assert sorted(itertools.chain(*epoch_steps(named, groups, 2, seeded()))) == named


@given(groups, sizes, st.integers(0, 60))
def test_an_order_goes_on_where_another_stood(groups: list, size: int, place: int) -> None:
    generator = seeded()
    whole = EpochSampler(everyone(groups), groups, size, generator)
    taken = list(itertools.islice(whole, place))
    assert len(taken) == place
    state, numbers = json.loads(json.dumps(whole.state_dict())), generator.get_state()
    again = EpochSampler(everyone(groups), groups, size, other := seeded(7))
    again.load_state_dict(state)
    other.set_state(numbers)
    assert list(itertools.islice(again, 50)) == list(itertools.islice(whole, 50))


def test_what_is_left_of_groups_shares_steps_and_alike_ones_stay_together() -> None:
    groups = ["wide"] * 6 + ["tall"] * 6
    for seed in range(5):
        steps = epoch_steps(range(12), groups, 4, seeded(seed))
        kinds = sorted(sorted(groups[number] for number in step) for step in steps)
        assert kinds == [["tall"] * 4, ["tall"] * 2 + ["wide"] * 2, ["wide"] * 4]
        assert sorted(len(part) for step in steps for part in micro_batches(step, groups, 4)) == [2, 2, 4, 4]


def test_a_picture_in_a_mixed_step_meets_others_each_time() -> None:
    groups = list(range(12))  # each of its own size
    taken = [step for _, _, step in itertools.islice(EpochSampler(everyone(groups), groups, 4, seeded()), 300)]
    partners = Counter(number for step in taken if 3 in step for number in step)
    assert len(partners) == 12 and min(partners.values()) > 10


def test_one_variant_of_each_picture_comes_in_an_epoch() -> None:
    variants = {0: [0, 1, 2], 3: [3], 4: [4, 5]}
    order = EpochSampler(list(variants), ["x"] * 6, 2, seeded(), variants=variants)
    epochs: dict[int, list[int]] = {}
    for epoch, _, batch in itertools.islice(order, 2 * 200):
        epochs.setdefault(epoch, []).extend(batch)
    for numbers in epochs.values():
        assert len(numbers) == 3 and all(len(set(numbers) & set(own)) == 1 for own in variants.values())
    shown = Counter(number for numbers in epochs.values() for number in numbers)
    assert all(50 < shown[number] < 85 for number in (0, 1, 2)) and shown[3] == 200


def test_the_largest_batch_is_found_among_variants_of_all_sizes() -> None:
    model = toy(6, batch_keys=["small", "large", "small", "large", "small", "small"])
    model.latents = [
        torch.zeros(1, 4, 8, 8) if kind == "large" else torch.zeros(1, 4, 2, 2) for kind in model.batch_keys
    ]
    assert largest_batch([0, 2, 4], model, 4) == (3, 0)
    model.variants = {0: [0, 1], 2: [2, 3], 4: [4, 5]}
    rows, number = largest_batch([0, 2, 4], model, 4)
    assert rows == 2 and number in (1, 3)  # the third picture has no large variant
    assert largest_batch([0, 2, 4], model, 1)[0] == 1
