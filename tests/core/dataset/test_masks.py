"""Which files are masks, and of which picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from aclora_core.dataset.folder import IMAGE_SUFFIXES
from aclora_core.dataset.masks import find_masks, is_mask, is_mask_folder


def found(folder: Path, *names: str) -> tuple[dict[str, str], list[str]]:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    files = [path.name for path in folder.iterdir() if path.is_file()]
    masks, spare = find_masks(folder, files, [p.name for p in folder.iterdir() if p.is_dir()], IMAGE_SUFFIXES)
    of_picture = {name: path.relative_to(folder).as_posix() for name, path in masks.items()}
    return of_picture, [path.relative_to(folder).as_posix() for path in spare]


@pytest.mark.parametrize("mask", ["a-masklabel.png", "a-MaskLabel.PNG", "masks/a.jpg", "Mask/a.png", "masks/a.webp"])
def test_the_customs_of_other_trainers_are_known(tmp_path: Path, mask: str) -> None:
    assert found(tmp_path, "a.jpg", "b.jpg", mask) == ({"a.jpg": mask}, [])


def test_a_file_beside_the_picture_goes_first_and_then_the_very_same_name(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "b.png", "a-masklabel.png", "masks/a.jpg", "masks/b.jpg", "masks/b.png"]
    masks, spare = found(tmp_path, *names)
    assert masks == {"a.jpg": "a-masklabel.png", "b.jpg": "masks/b.jpg", "b.png": "masks/b.png"}
    assert spare == ["masks/a.jpg"]


def test_masks_of_no_picture_are_named_and_other_files_are_not(tmp_path: Path) -> None:
    names = ["a.jpg", "c-masklabel.png", "masks/b.png", "masks/notes.txt", "masks/.hidden.png", "other/a.png"]
    assert found(tmp_path, *names) == ({}, ["c-masklabel.png", "masks/b.png"])


def test_only_the_end_of_a_name_makes_a_mask() -> None:
    assert is_mask("rocket-masklabel.png") and not is_mask("masklabel of a rocket.png") and not is_mask("mask.png")
    assert is_mask_folder("Masks") and not is_mask_folder("carnival masks")
