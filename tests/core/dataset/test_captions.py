"""Captions: found beside their image, read as UTF-8 within limits, and with the trigger word."""

from __future__ import annotations

import os
import tracemalloc
import unicodedata
from pathlib import Path

import pytest

from aclora_core.dataset.captions import MAX_CAPTIONS, MAX_FILE_SIZE, MAX_LENGTH, match_captions
from aclora_core.dataset.finding import ignored_repeats
from aclora_core.dataset.folder import scan_folder
from tests.support.image_files import save_image


@pytest.mark.parametrize(
    ("written", "trigger", "expected"),
    [
        (None, "inkstyle", "inkstyle"),
        ("", "inkstyle", "inkstyle"),
        (" \n ", "inkstyle", "inkstyle"),
        (None, "", ""),
        ("a rocket", "", "a rocket"),
        ("a rocket", "inkstyle", "inkstyle, a rocket"),
        ("a rocket, InkStyle", "inkstyle", "InkStyle, a rocket"),
        ("a rocket in inkstyle, blue sky", "inkstyle", "a rocket in inkstyle, blue sky"),
        ("three inkstyles", "inkstyle", "inkstyle, three inkstyles"),
        ("a\t rocket  of\xa0 tin\n", " ink  style ", "ink style, a rocket of tin"),
        ("c++ (cover)", "c++", "c++ (cover)"),
        ("a rocket", "inkstyle, ", "inkstyle, a rocket"),
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


def save_caption(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.txt")),
        (unicodedata.normalize("NFC", "ガ.png"), unicodedata.normalize("NFD", "ガ.caption")),
        ("IMG_1.JPG", "img_1.txt"),
        ("Straße.png", "STRASSE.TXT"),
        ("a.png", "a.png.txt"),
        ("A.PNG", "a.png.TXT"),
    ],
)
def test_names_match_over_unicode_forms_and_case(tmp_path: Path, image: str, caption: str) -> None:
    save_image(tmp_path / image)
    save_caption(tmp_path / caption, "at night")
    (found,) = scan_folder(tmp_path, "ink").images
    assert found.caption == "ink, at night" and found.has_caption


def test_the_exact_name_takes_precedence() -> None:
    images = ["A.png", "a.png", "c.png", "d.png"]
    files = [*images, "a.txt", "A.txt", "c.txt", "c.caption", "c.png.txt", "D.txt", "d.caption"]
    expected = {"A.png": "A.txt", "a.png": "a.txt", "c.png": "c.txt", "d.png": "d.caption"}
    assert match_captions(images, files) == expected


def test_the_text_is_composed_as_people_type_it(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_caption(tmp_path / "a.txt", unicodedata.normalize("NFD", "un café, stylé"))
    assert scan_folder(tmp_path, unicodedata.normalize("NFD", "stylé")).images[0].caption == "stylé, un café"


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", "\u2028"])
def test_each_line_is_a_caption(tmp_path: Path, ending: str) -> None:
    save_image(tmp_path / "a.png")
    save_caption(tmp_path / "a.txt", ending.join(["a tabby cat", "", "1cat,  ink", " ", "photo"]) + ending)
    (image,) = scan_folder(tmp_path, "ink").images
    assert (image.caption, *image.other_captions) == ("ink, a tabby cat", "ink, 1cat", "ink, photo")
    (image,) = scan_folder(tmp_path, "ink", lines="joined").images
    assert (image.caption, image.other_captions) == ("a tabby cat 1cat, ink photo", ())


def test_a_missing_or_empty_caption_is_known_as_such(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / f"{name}.png")
    save_caption(tmp_path / "b.txt", "\ufeff \n")
    save_caption(tmp_path / "c.txt", "ink")
    images = scan_folder(tmp_path, "ink").images
    assert [(image.caption, image.has_caption) for image in images] == [("ink", False), ("ink", False), ("ink", True)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("word " * (MAX_LENGTH // 5 + 1), r"longer than 10,000 characters"),
        ("a\n" * (MAX_CAPTIONS + 1), r"has 101 lines, more than 100"),
        ("short lines are no way around it\n" * (MAX_FILE_SIZE // 10), r"larger than 64 KB"),
    ],
)
def test_a_caption_without_end_is_an_error_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    save_image(tmp_path / "a.png")
    save_caption(tmp_path / "a.txt", text)
    with pytest.raises(ValueError, match=rf"The caption a\.txt of a\.png .*{said}"):
        scan_folder(tmp_path)


def test_the_longest_captions_allowed_are_read(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_caption(tmp_path / "a.txt", "\n".join(["x" * MAX_LENGTH] * 6))
    (image,) = scan_folder(tmp_path).images
    assert len(image.caption) == MAX_LENGTH and len(image.other_captions) == 5
    with pytest.raises(ValueError, match="longer than 10,000"):
        scan_folder(tmp_path, lines="joined")


def test_gigabytes_are_not_read(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    with open(tmp_path / "a.txt", "wb") as file:
        os.truncate(file.fileno(), 8 << 30)  # sparse: takes no room on the drive
    tracemalloc.start()
    with pytest.raises(ValueError, match="larger than 64 KB"):
        scan_folder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize(
    ("name", "repeats"),
    [("10 dogs", 10), ("10-dogs", 10), ("10dogs", 10), ("10＿dogs", 10), ("10_dogs", 0), ("dogs", 0), ("1 dog", 0)],
)
def test_folders_that_look_like_repeats_are_known(name: str, repeats: int) -> None:
    assert ignored_repeats(name) == repeats
    assert ignored_repeats("2024 spring") == ignored_repeats("0 none") == ignored_repeats("10") == 0
    assert ignored_repeats("10_dogs", is_subfolder=False) == 10
