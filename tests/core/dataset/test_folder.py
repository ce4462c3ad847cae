"""Scanning a folder: order, repeats, problems and the fingerprint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aclora_core.dataset.folder import MIN_SIDE, folder_fingerprint, scan_folder
from tests.support.image_files import save_image


def names(folder: Path) -> list[str]:
    return [item.name for item in scan_folder(folder).images]


def test_images_come_in_natural_order_whatever_their_format(tmp_path: Path) -> None:
    for name in ("b10.png", "b9.JPG", "B1.webp", "a.bmp", "notes.md"):
        if name.endswith("md"):
            (tmp_path / name).write_text("not an image")
        else:
            save_image(tmp_path / name)
    assert names(tmp_path) == ["a.bmp", "B1.webp", "b9.JPG", "b10.png"]


def test_subfolders_are_repeated_as_often_as_their_name_says(tmp_path: Path) -> None:
    save_image(tmp_path / "z.png")
    save_image(tmp_path / "10_cat" / "a.png")
    save_image(tmp_path / "2_dog" / "a.png")
    save_image(tmp_path / "other" / "a.png")
    save_image(tmp_path / "0_skipped" / "a.png")
    save_image(tmp_path / "other" / "deeper" / "a.png")
    save_image(tmp_path / ".hidden" / "a.png")
    save_image(tmp_path / "other" / "._a.png")
    found = [(item.name, item.repeats) for item in scan_folder(tmp_path).images]
    assert found == [("z.png", 1), ("2_dog/a.png", 2), ("10_cat/a.png", 10), ("other/a.png", 1)]


def test_a_year_as_folder_name_is_not_a_number_of_repeats(tmp_path: Path) -> None:
    save_image(tmp_path / "2024_spring" / "a.png")
    with pytest.raises(ValueError, match='"2024_spring" asks for 2024 repeats'):
        scan_folder(tmp_path)


def test_an_empty_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match='"empty" has no images'):
        scan_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match='"gone" cannot be read: No such file'):
        scan_folder(tmp_path / "gone")


def test_broken_images_are_skipped_and_named_without_their_path(tmp_path: Path) -> None:
    save_image(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("I am text")
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "ghost.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    result = scan_folder(tmp_path)
    assert [item.name for item in result.images] == ["good.png"]
    assert [problem.split()[0] for problem in result.problems] == ["ghost.png", "text.png", "zero.jpg"]
    assert str(tmp_path) not in "".join(result.problems)


def test_a_folder_of_only_broken_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("I am text")
    with pytest.raises(ValueError, match=r"None of the 1 images in .* can be used\. a\.png"):
        scan_folder(tmp_path)


def test_a_tiny_image_is_an_error_that_says_the_minimum(tmp_path: Path) -> None:
    save_image(tmp_path / "dot.png", (1, 1))
    save_image(tmp_path / "good.png", (MIN_SIDE, MIN_SIDE))
    with pytest.raises(ValueError, match=r"dot\.png is 1 × 1 pixels.* at least 32\."):
        scan_folder(tmp_path)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    for number in range(7):
        save_image(tmp_path / f"dot{number}.png", (1, 1))
    with pytest.raises(ValueError, match=r"(?s)dot0.*\n.*dot4.*\n\(and 2 more\)"):
        scan_folder(tmp_path)


def test_the_fingerprint_changes_with_images_and_captions(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png")
    seen = [folder_fingerprint(tmp_path)]
    assert folder_fingerprint(tmp_path) == seen[0]
    (tmp_path / "notes.md").write_text("not read, not seen")
    assert folder_fingerprint(tmp_path) == seen[0]

    def changed() -> None:
        seen.append(folder_fingerprint(tmp_path))
        assert len(set(seen)) == len(seen)

    os.utime(path, ns=(1, 1))
    changed()
    (tmp_path / "a.txt").write_text("one")
    changed()
    (tmp_path / "a.txt").write_text("three")
    changed()
    save_image(tmp_path / "3_more" / "b.png")
    changed()
    (tmp_path / "3_more").rename(tmp_path / "4_more")
    changed()


def test_a_subfolder_can_be_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "plain" / "b.png")
    assert [item.name for item in scan_folder(tmp_path, without=tmp_path / "plain").images] == ["a.png"]
