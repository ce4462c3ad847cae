"""Variants of a captioned image: what they share with it, and how often each kind comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.dataset.augmentation import Variant, variants

TAGS = st.lists(st.text("abc ", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=7)


def test_by_default_there_is_only_the_image_itself() -> None:
    assert variants("ink, a rocket") == [Variant("ink, a rocket", False)]
    assert variants("") == [Variant("", False)]


@given(TAGS, st.booleans(), st.integers(0, 5), st.integers(0, 8), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_first_variant_is_the_image(tags: list[str], flip: bool, shuffles: int, kept: int, drop: float) -> None:
    caption = ",".join(tags)
    assert variants(caption, flip, shuffles, kept, drop)[0] == Variant(caption, False)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shuffles", [0, 1, 4])
@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.25, 0.5])
def test_captions_are_dropped_about_as_often_as_requested(flip: bool, shuffles: int, dropout: float) -> None:
    found = variants("ink, a, b, c, d", flip, shuffles, 1, dropout)
    share = sum(not each.caption for each in found) / len(found)
    assert abs(share - dropout) <= dropout / 4
    assert sum(each.mirrored for each in found) == (len(found) / 2 if flip else 0)
    assert len(found) <= 42


def test_an_impossible_dropout_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"The caption dropout is 0\.9\. Set a fraction"):
        variants("ink", dropout=0.9)


@given(TAGS, st.booleans(), st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 3))
def test_every_size_has_the_same_variants(tags: list[str], flip: bool, shuffles: int, drop: float, n: int):
    caption = ",".join(tags)
    one, several = variants(caption, flip, shuffles, 1, drop), variants(caption, flip, shuffles, 1, drop, n)
    assert several[0] == Variant(caption) and variants(caption, flip, shuffles, 1, drop, 1) == one
    counts = {size: sorted((v.caption, v.mirrored) for v in several if v.size_index == size) for size in range(n)}
    assert all(own == counts[0] for own in counts.values())
    assert counts[0] == sorted((v.caption, v.mirrored) for v in one)


def test_several_captions_come_about_equally_often() -> None:
    found = variants("a sentence", shuffles=3, others=("ink, a, b, c", "short"), trigger="ink")
    assert found[0] == Variant("a sentence")
    counts = {text: sum(each.caption == text for each in found) for text in ("a sentence", "short")}
    tags = [each.caption for each in found if each.caption.startswith("ink, ")]
    assert counts == {"a sentence": 4, "short": 4} and len(tags) == len(set(tags)) == 4
    assert variants("one", flip=True, others=("two",)) == [
        Variant("one"),
        Variant("one", True),
        Variant("two"),
        Variant("two", True),
    ]
