"""Masks: which file belongs to which image, and what is loaded from it."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclora_core.dataset.decoding import load_image
from aclora_core.dataset.finding import IMAGE_SUFFIXES
from aclora_core.dataset.folder import folder_fingerprint, scan_folder
from aclora_core.dataset.masks import find_masks, is_mask, is_mask_folder, load_mask
from tests.support.image_files import save_image, scanned_image, two_halves


def found(folder: Path, *names: str) -> tuple[dict[str, str], list[str]]:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    files = [path.name for path in folder.iterdir() if path.is_file()]
    mask_files = {p.name: os.listdir(p) for p in folder.iterdir() if p.is_dir() and is_mask_folder(p.name)}
    masks, unmatched = find_masks(folder, files, mask_files, IMAGE_SUFFIXES)
    by_image = {name: path.relative_to(folder).as_posix() for name, path in masks.items()}
    return by_image, [path.relative_to(folder).as_posix() for path in unmatched]


@pytest.mark.parametrize("mask", ["a-masklabel.png", "a-MaskLabel.PNG", "masks/a.jpg", "Mask/a.png", "masks/a.webp"])
def test_conventions_of_other_trainers_are_known(tmp_path: Path, mask: str) -> None:
    assert found(tmp_path, "a.jpg", "b.jpg", mask) == ({"a.jpg": mask}, [])


def test_a_mask_beside_the_image_takes_precedence_then_the_exact_name(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "b.png", "a-masklabel.png", "masks/a.jpg", "masks/b.jpg", "masks/b.png"]
    masks, unmatched = found(tmp_path, *names)
    assert masks == {"a.jpg": "a-masklabel.png", "b.jpg": "masks/b.jpg", "b.png": "masks/b.png"}
    assert unmatched == ["masks/a.jpg"]


@pytest.mark.parametrize("mask", ["CAFÉ-masklabel.png", "masks/Café.jpg", "masks/café.png"])
def test_names_match_over_unicode_forms_and_case(tmp_path: Path, mask: str) -> None:
    image = unicodedata.normalize("NFD", "café.jpg")
    assert found(tmp_path, image, mask) == ({image: mask}, [])


def test_masks_without_an_image_are_named_and_other_files_are_not(tmp_path: Path) -> None:
    names = ["a.jpg", "c-masklabel.png", "masks/b.png", "masks/notes.txt", "masks/.hidden.png", "other/a.png"]
    assert found(tmp_path, *names) == ({}, ["c-masklabel.png", "masks/b.png"])


def test_only_the_end_of_a_name_makes_a_mask() -> None:
    assert is_mask("rocket-masklabel.png") and not is_mask("masklabel of a rocket.png") and not is_mask("mask.png")
    assert is_mask_folder("Masks") and not is_mask_folder("carnival masks")


def test_a_mask_is_not_an_image_and_is_scaled_and_cropped_as_its_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (12, 10), dtype=np.uint8).repeat(16, 0).repeat(16, 1) * 255
    grey = Image.fromarray(pixels)
    grey.convert("RGB").save(tmp_path / "a.png")
    grey.resize((80, 96), Image.Resampling.NEAREST).save(save_image(tmp_path / "masks" / "a.png"))
    grey.save(tmp_path / "b-masklabel.png")
    save_image(tmp_path / "b.jpg", (160, 192))
    save_image(tmp_path / "c.png")
    save_image(tmp_path / "4_more" / "d.png")
    save_image(tmp_path / "4_more" / "masks" / "d.webp", color="white")
    found = scan_folder(tmp_path)
    assert [item.name for item in found.images] == ["a.png", "b.jpg", "c.png", "4_more/d.png"]
    assert [item.mask is not None for item in found.images] == [True, True, False, True] and not found.unmatched_masks
    for size in ((64, 64), (96, 32), (160, 192)):
        seen = load_image(scanned_image(tmp_path / "a.png"), size)[..., 0]
        for name in ("a.png", "b.jpg"):
            mask = load_mask(scanned_image(tmp_path / name), size)
            assert mask.shape == seen.shape and float((mask - seen).abs().mean()) < 0.06
    assert load_mask(scanned_image(tmp_path / "c.png"), (64, 64)) is None
    before = folder_fingerprint(tmp_path)
    os.utime(tmp_path / "masks" / "a.png", ns=(1, 1))
    assert folder_fingerprint(tmp_path) != before


def test_the_alpha_channel_can_be_the_mask(tmp_path: Path) -> None:
    half = two_halves(64, 64).convert("RGBA")
    half.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 32 + [255] * 32]), 64, 0)))
    half.save(tmp_path / "a.png")
    two_halves(64, 64).convert("RGBA").save(tmp_path / "b.png")  # a channel that hides nothing
    mask = load_mask(scanned_image(tmp_path / "a.png"), (32, 32), alpha=True)
    assert not mask[:, :16].any() and (mask[:, 16:] == 1).all()
    assert load_mask(scanned_image(tmp_path / "a.png"), (32, 32)) is None
    assert load_mask(scanned_image(tmp_path / "b.png"), (32, 32), alpha=True) is None
    save_image(tmp_path / "a-masklabel.png", color="white")
    assert (load_mask(scanned_image(tmp_path / "a.png"), (32, 32), alpha=True) == 1).all()  # the file goes first


def test_transparent_parts_of_a_mask_file_are_black(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    painted = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    painted.paste("white", (0, 0, 64, 32))
    painted.save(tmp_path / "a-masklabel.png")
    mask = load_mask(scanned_image(tmp_path / "a.png"), (64, 64))
    assert (mask[:32] == 1).all() and not mask[32:].any()


def test_a_mask_of_another_shape_or_content_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "masks" / "a.png", (64, 48), "white")
    with pytest.raises(ValueError, match=r"The mask of a\.png is 64 × 48 pixels, but the image is 64 × 64"):
        load_mask(scanned_image(tmp_path / "a.png"), (64, 64))
    (tmp_path / "masks" / "a.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"The mask a\.png of a\.png cannot be read"):
        load_mask(scanned_image(tmp_path / "a.png"), (64, 64))
