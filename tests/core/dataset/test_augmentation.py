"""Variants of a captioned picture: what they share with it, and how often each kind comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.dataset.augmentation import Variant, variants
from aclora_core.dataset.captions import shuffle_tags

TAGS = st.lists(st.text("abc ", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=7)


def test_without_wishes_there_is_the_picture_alone() -> None:
    assert variants("ink, a rocket") == [Variant("ink, a rocket", False)]
    assert variants("") == [Variant("", False)]


@given(TAGS, st.booleans(), st.integers(0, 5), st.integers(0, 8), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_first_is_the_picture_as_it_is(tags: list[str], flip: bool, shuffles: int, kept: int, drop: float) -> None:
    caption = ",".join(tags)
    assert variants(caption, flip, shuffles, kept, drop)[0] == Variant(caption, False)


@given(TAGS, st.integers(0, 6), st.integers(0, 8))
def test_orders_differ_keep_the_first_tags_and_lose_none(tags: list[str], shuffles: int, kept: int) -> None:
    caption = ", ".join(tag.strip() for tag in tags)
    orders = shuffle_tags(caption, shuffles, kept)
    assert len(orders) == len(set(orders)) <= shuffles + 1
    for order in orders:
        assert sorted(order.split(", ")) == sorted(caption.split(", "))
        assert order.split(", ")[:kept] == caption.split(", ")[:kept]
    assert shuffle_tags(caption, shuffles, kept) == orders


def test_as_many_orders_as_wanted_while_there_are_so_many() -> None:
    assert len(shuffle_tags("ink, a, b, c", 3)) == 4
    assert sorted(shuffle_tags("ink, a, b", 9)) == ["ink, a, b", "ink, b, a"]
    assert shuffle_tags("ink, a", 9) == ["ink, a"]
    assert shuffle_tags("ink, a, a", 9) == ["ink, a, a"]
    assert len(set(shuffle_tags("ink, " + ", ".join("abcdefghijkl"), 16))) == 17


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shuffles", [0, 1, 4])
@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.25, 0.5])
def test_captions_are_dropped_about_as_often_as_wanted(flip: bool, shuffles: int, dropout: float) -> None:
    found = variants("ink, a, b, c, d", flip, shuffles, 1, dropout)
    share = sum(not each.caption for each in found) / len(found)
    assert abs(share - dropout) <= dropout / 4
    assert sum(each.mirrored for each in found) == (len(found) / 2 if flip else 0)
    assert len(found) <= 42


def test_an_impossible_dropout_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"The caption dropout is 0\.9\. Set a share"):
        variants("ink", dropout=0.9)


@given(TAGS, st.booleans(), st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 3))
def test_every_look_comes_in_every_size_as_often(tags: list[str], flip: bool, shuffles: int, drop: float, n: int):
    caption = ",".join(tags)
    one, several = variants(caption, flip, shuffles, 1, drop), variants(caption, flip, shuffles, 1, drop, n)
    assert several[0] == Variant(caption) and variants(caption, flip, shuffles, 1, drop, 1) == one
    counts = {size: sorted((v.caption, v.mirrored) for v in several if v.size == size) for size in range(n)}
    assert all(own == counts[0] for own in counts.values())
    assert counts[0] == sorted((v.caption, v.mirrored) for v in one)
