"""Captions: found beside their image, read as UTF-8, with the trigger word and shuffled tags."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.dataset.captions import shuffle_tags
from aclora_core.dataset.folder import scan_folder
from tests.support.image_files import save_image

TAGS = st.lists(st.text("abc ", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("written", "trigger", "expected"),
    [
        (None, "inkstyle", "inkstyle"),
        ("", "inkstyle", "inkstyle"),
        (" \n ", "inkstyle", "inkstyle"),
        (None, "", ""),
        ("a rocket", "", "a rocket"),
        ("a rocket", "inkstyle", "inkstyle, a rocket"),
        ("a rocket, InkStyle", "inkstyle", "a rocket, InkStyle"),
        ("three inkstyles", "inkstyle", "inkstyle, three inkstyles"),
        ("a\r\nrocket\t of  tin\n", " ink  style ", "ink style, a rocket of tin"),
        ("c++ (cover)", "c++", "c++ (cover)"),
    ],
)
def test_captions_carry_the_trigger_word(tmp_path: Path, written: str | None, trigger: str, expected: str) -> None:
    save_image(tmp_path / "a.png")
    if written is not None:
        (tmp_path / "a.txt").write_bytes(written.encode())
    assert scan_folder(tmp_path, trigger).images[0].caption == expected


def test_captions_are_found_beside_their_image(tmp_path: Path) -> None:
    folder = tmp_path / "my.png"  # a folder whose name contains the suffix
    for name in ("a.png", "b.v2.png", "c.png", "d.png"):
        save_image(folder / name)
    (folder / "a.txt").write_bytes("\ufeffwith a mark, é".encode())
    (folder / "a.caption").write_text("not this one")
    (folder / "b.v2.TXT").write_text("two dots")
    (folder / "c.caption").write_text("other suffix")
    assert [item.caption for item in scan_folder(folder).images] == ["with a mark, é", "two dots", "other suffix", ""]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_a_caption_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path, encoding: str) -> None:
    save_image(tmp_path / "cafe.png")
    (tmp_path / "cafe.txt").write_bytes("un café".encode(encoding))
    with pytest.raises(ValueError, match=r"cafe\.txt of cafe\.png is not UTF-8 text: open"):
        scan_folder(tmp_path)


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
