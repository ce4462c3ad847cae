"""Tags: split at commas outside brackets, shuffled without a loss, with the trigger word in front."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.dataset.tags import shuffle_tags, split_tags, with_trigger

TAGS = st.lists(st.text("abc ", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("ink, (cat, dog:1.3), red sky", ["ink", "(cat, dog:1.3)", "red sky"]),
        ("((a, b), [c, d]), e", ["((a, b), [c, d])", "e"]),
        (r"saber \(fate, night\), armor", [r"saber \(fate, night\)", "armor"]),
        ("{red, blue|green}, sky", ["{red, blue|green}", "sky"]),
        ('a sign "open, now", wall', ['a sign "open, now"', "wall"]),
        ("a sign “open, now”, wall", ["a sign “open, now”", "wall"]),
        ("红色（大，小），蓝天、草地, sun", ["红色（大，小）", "蓝天", "草地", "sun"]),
        (":(, sad, >:(, rain", [":(", "sad", ">:(", "rain"]),
        (";), a, b), c", [";)", "a", "b)", "c"]),
        ('a 24" screen, a 5" screen, b', ['a 24" screen', 'a 5" screen', "b"]),
        ("(a, [b), c", ["(a, [b)", "c"]),
        ("it's a cat, dog's bone, x", ["it's a cat", "dog's bone", "x"]),
        (", a,, b ,", ["a", "b"]),
        ("", []),
    ],
)
def test_commas_separate_tags_outside_brackets_and_quotes(caption: str, tags: list[str]) -> None:
    assert split_tags(caption) == tags
    for order in shuffle_tags(caption, 8):
        assert sorted(split_tags(order)) == sorted(tags)


def test_full_width_commas_stay_full_width() -> None:
    assert sorted(shuffle_tags("墨，猫，狗", 5)) == ["墨，狗，猫", "墨，猫，狗"]
    assert with_trigger("猫，狗，ink", "ink") == "ink，猫，狗"
    assert with_trigger("猫，狗", "ink") == "ink，猫，狗"


@pytest.mark.parametrize(
    ("caption", "trigger", "front"),
    [
        ("a cat, blue sky, tall grass, inkstyle", "inkstyle", "inkstyle"),
        ("a cat, blue sky, InkStyle, tall grass", "inkstyle", "InkStyle"),
        ("a cat, sky, ink, flat colour, grass", "ink, flat colour", "ink, flat colour"),
        ("ink, flat colour, a cat, sky, grass", "ink,flat  colour", "ink, flat colour"),
        ("ink, a cat, sky, flat colour", "ink, flat colour", "ink, flat colour, ink"),
        ("ink (bold, flat), a cat, sky, grass", "ink (bold, flat)", "ink (bold, flat)"),
    ],
)
def test_the_trigger_stays_in_front_wherever_it_stood(caption: str, trigger: str, front: str) -> None:
    written = with_trigger(caption, trigger)
    assert with_trigger(written, trigger) == written
    orders = shuffle_tags(written, 8, 1, trigger)
    assert len(orders) > 1
    assert all(order.startswith(front.rpartition(", ink")[0] or front) for order in orders)


def test_a_tag_that_holds_the_trigger_is_the_first_that_is_kept() -> None:
    orders = shuffle_tags("red sky, a cat in inkstyle, grass", 8, 1, "inkstyle")
    assert orders[0] == "red sky, a cat in inkstyle, grass"
    assert sorted(orders[1:]) == ["a cat in inkstyle, grass, red sky", "a cat in inkstyle, red sky, grass"]


def test_two_kept_tags_are_the_trigger_and_the_first_other() -> None:
    orders = shuffle_tags("ink, flat, a, b, c", 8, 2, "ink, flat")
    assert len(orders) == 2 and all(order.startswith("ink, flat, a, ") for order in orders)


@given(TAGS, st.integers(0, 6), st.integers(0, 8))
def test_tag_orders_differ_keep_the_first_tags_and_lose_none(tags: list[str], shuffles: int, kept: int) -> None:
    caption = ", ".join(tag.strip() for tag in tags)
    orders = shuffle_tags(caption, shuffles, kept)
    assert len(orders) == len(set(orders)) <= shuffles + 1
    for order in orders:
        assert sorted(order.split(", ")) == sorted(caption.split(", "))
        assert order.split(", ")[:kept] == caption.split(", ")[:kept]
    assert shuffle_tags(caption, shuffles, kept) == orders


def test_there_are_as_many_tag_orders_as_requested_if_they_exist() -> None:
    assert len(shuffle_tags("ink, a, b, c", 3)) == 4
    assert sorted(shuffle_tags("ink, a, b", 9)) == ["ink, a, b", "ink, b, a"]
    assert shuffle_tags("ink, a", 9) == ["ink, a"]
    assert shuffle_tags("ink, a, a", 9) == ["ink, a, a"]
    assert len(set(shuffle_tags("ink, " + ", ".join("abcdefghijkl"), 16))) == 17
