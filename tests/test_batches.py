"""The order of the pictures: each once in an epoch, only alike ones together, the same for the same seed."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.batches import (
    Order,
    alike,
    epoch_batches,
    largest_batch,
    steps_per_epoch,
    usual_steps_per_epoch,
)
from tests.toy import toy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everyone(groups: list) -> range:
    return range(len(groups))


groups = st.lists(st.sampled_from(["square", "wide", ("tall", 77)]), min_size=1, max_size=40)
sizes = st.integers(1, 9)


@given(groups, sizes, st.integers(0, 99))
def test_every_picture_comes_once_in_an_epoch(groups: list, size: int, seed: int) -> None:
    batches = epoch_batches(everyone(groups), groups, size, seeded(seed))
    assert sorted(itertools.chain(*batches)) == list(range(len(groups)))


@given(groups, sizes, st.integers(0, 99))
def test_a_batch_holds_pictures_of_one_group_and_is_full_where_it_can_be(groups: list, size: int, seed: int) -> None:
    batches = epoch_batches(everyone(groups), groups, size, seeded(seed))
    for batch in batches:
        assert len({groups[number] for number in batch}) == 1 and 1 <= len(batch) <= size
    smaller = Counter(groups[batch[0]] for batch in batches if len(batch) < size)
    assert all(count == 1 for count in smaller.values())


@given(groups, sizes)
def test_steps_per_epoch_is_the_number_of_batches(groups: list, size: int) -> None:
    count = steps_per_epoch(everyone(groups), groups, size)
    assert count == len(epoch_batches(everyone(groups), groups, size, seeded())) >= math.ceil(len(groups) / size)


@given(groups, sizes, st.integers(1, 4))
def test_epochs_follow_each_other_and_say_when_they_end(groups: list, size: int, epochs: int) -> None:
    length = steps_per_epoch(everyone(groups), groups, size)
    taken = list(itertools.islice(Order(everyone(groups), groups, size, seeded()), epochs * length))
    assert [epoch for epoch, _, _ in taken] == [1 + place // length for place in range(len(taken))]
    assert [ends for _, ends, _ in taken] == [(place + 1) % length == 0 for place in range(len(taken))]
    seen = Counter(number for _, _, batch in taken for number in batch)
    assert seen == dict.fromkeys(range(len(groups)), epochs)


def test_the_order_follows_the_seed_and_changes_from_epoch_to_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        return [batch for _, _, batch in itertools.islice(Order(range(20), [0] * 20, 4, seeded(seed)), 10)]

    assert epochs(1) == epochs(1) != epochs(2)
    assert epochs(1)[:5] != epochs(1)[5:]


def test_pictures_of_a_group_meet_others_and_groups_mix() -> None:
    groups = ["a"] * 8 + ["b"] * 8
    taken = [batch for _, _, batch in itertools.islice(Order(everyone(groups), groups, 2, seeded()), 400)]
    partners = {number for batch in taken if 3 in batch for number in batch} - {3}
    assert partners == {0, 1, 2, 4, 5, 6, 7}
    epochs = [[groups[batch[0]] for batch in taken[place : place + 8]] for place in range(0, 400, 8)]
    blocks = [sum(1 for _ in itertools.groupby(epoch)) for epoch in epochs]
    assert sum(blocks) / len(blocks) > 4  # 5 on average when mixed, 2 when one group follows the other


def test_a_batch_larger_than_the_dataset_takes_all_of_it() -> None:
    assert sorted(epoch_batches(range(3), ["x"] * 3, 100, seeded())[0]) == [0, 1, 2]
    assert steps_per_epoch(range(3), ["x"] * 3, 100) == 1


def test_random_numbers_of_others_are_not_touched() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    epoch_batches(range(9), ["x"] * 9, 2, seeded(3))
    assert torch.rand(1) == pytest.approx(float(expected), abs=0)


def test_only_the_pictures_that_were_named_take_part() -> None:
    groups = ["a", "b"] * 6
    named = [1, 2, 5, 8, 9]
    assert sorted(itertools.chain(*epoch_batches(named, groups, 2, seeded()))) == named
    assert steps_per_epoch(named, groups, 2) == 3  # 1, 5, 9 of one group and 2, 8 of the other


@given(groups, sizes, st.integers(0, 60))
def test_an_order_goes_on_where_another_stood(groups: list, size: int, place: int) -> None:
    generator = seeded()
    whole = Order(everyone(groups), groups, size, generator)
    taken = list(itertools.islice(whole, place))
    assert len(taken) == place
    state, numbers = json.loads(json.dumps(whole.state_dict())), generator.get_state()
    again = Order(everyone(groups), groups, size, other := seeded(7))
    again.load_state_dict(state)
    other.set_state(numbers)
    assert list(itertools.islice(again, 50)) == list(itertools.islice(whole, 50))


@pytest.mark.parametrize("count", [1, 7, 12, 13])
@pytest.mark.parametrize(("size", "accumulate"), [(1, 4), (2, 2), (3, 3)])
def test_several_batches_of_a_step_are_one_large_batch(count: int, size: int, accumulate: int) -> None:
    alone = epoch_batches(range(count), ["x"] * count, size * accumulate, seeded())
    assert epoch_batches(range(count), ["x"] * count, size, seeded(), accumulate) == alone
    assert steps_per_epoch(range(count), ["x"] * count, size, accumulate) == len(alone)


def test_what_is_left_of_groups_shares_steps() -> None:
    """Twelve pictures, each of its own size: without that a step would have one of them, however many it could take."""
    steps = epoch_batches(range(12), list(range(12)), 4, seeded(), 4)
    assert sorted(map(len, steps)) == [4, 4, 4] and sorted(itertools.chain(*steps)) == list(range(12))
    groups = ["wide"] * 6 + ["tall"] * 6
    steps = epoch_batches(range(12), groups, 1, seeded(), 4)
    kinds = sorted(sorted(groups[number] for number in step) for step in steps)
    assert kinds == [["tall"] * 4, ["tall"] * 2 + ["wide"] * 2, ["wide"] * 4]


@given(groups, sizes, st.integers(1, 5))
def test_every_picture_is_in_one_step_of_at_most_so_many_batches(groups: list, size: int, accumulate: int) -> None:
    pictures = everyone(groups)
    for seed in range(3):
        steps = epoch_batches(pictures, groups, size, seeded(seed), accumulate)
        assert sorted(itertools.chain(*steps)) == list(pictures)
        assert len(steps) == steps_per_epoch(pictures, groups, size, accumulate)
        for step in steps:
            batches = alike(step, groups, size)
            assert 1 <= len(batches) <= accumulate
            assert all(len({groups[number] for number in batch}) == 1 for batch in batches)


def test_one_batch_a_step_is_as_it_always_was() -> None:
    groups = ["a", "b", "a", "c", "a", "b", "a"]
    assert epoch_batches(range(7), groups, 2, seeded(4), 1) == epoch_batches(range(7), groups, 2, seeded(4))


def test_one_variant_of_each_picture_comes_in_an_epoch() -> None:
    variants = {0: [0, 1, 2], 3: [3], 4: [4, 5]}
    order = Order(list(variants), ["x"] * 6, 2, seeded(), variants=variants)
    epochs: dict[int, list[int]] = {}
    for epoch, _, batch in itertools.islice(order, 2 * 200):
        epochs.setdefault(epoch, []).extend(batch)
    for numbers in epochs.values():
        assert len(numbers) == 3 and all(len(set(numbers) & set(own)) == 1 for own in variants.values())
    shown = Counter(number for numbers in epochs.values() for number in numbers)
    assert all(50 < shown[number] < 85 for number in (0, 1, 2)) and shown[3] == 200


def test_the_usual_length_of_an_epoch_counts_variants_of_other_sizes() -> None:
    groups, variants = ["small", "large"] * 6, {2 * place: [2 * place, 2 * place + 1] for place in range(6)}
    pictures = list(variants)
    assert usual_steps_per_epoch(pictures, groups, 6) == steps_per_epoch(pictures, groups, 6) == 1
    length = usual_steps_per_epoch(pictures, groups, 6, variants=variants)
    order = Order(pictures, groups, 6, seeded(5), variants=variants)
    taken = list(itertools.takewhile(lambda step: step[0] <= 100, order))
    assert length == 2 == round(len(taken) / 100)  # almost never are all six drawn in one size
    alike_ones = ["x"] * 12
    assert usual_steps_per_epoch(pictures, alike_ones, 4, 1, variants) == steps_per_epoch(pictures, alike_ones, 4)


def test_the_largest_batch_is_found_among_variants_of_all_sizes() -> None:
    model = toy(6, groups=["small", "large", "small", "large", "small", "small"])
    model.latents = [torch.zeros(1, 4, 8, 8) if kind == "large" else torch.zeros(1, 4, 2, 2) for kind in model.groups]
    assert largest_batch([0, 2, 4], model, 4) == (3, 0)
    model.variants = {0: [0, 1], 2: [2, 3], 4: [4, 5]}
    rows, number = largest_batch([0, 2, 4], model, 4)
    assert rows == 2 and number in (1, 3)  # the third picture has no large variant
    assert largest_batch([0, 2, 4], model, 1)[0] == 1
