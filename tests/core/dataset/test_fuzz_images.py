"""Damaged images: pixels of the right shape or a sentence, never another error and never a hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from aclora_core.dataset import opening
from aclora_core.dataset.decoding import load_image
from aclora_core.dataset.image import CaptionedImage
from aclora_core.dataset.masks import load_mask
from aclora_core.dataset.opening import read_header
from tests.support.image_fuzz import HEIGHT, WIDTH, damaged_files, whole_files

BUCKET = (64, 48)
COUNT = 700
MAX_SECONDS = 10.0  # for one file, on a machine that does other things too


def decode(path: Path) -> CaptionedImage:
    """Do all that the dataset does with an image."""
    width, height, moving = read_header(path, path.name)
    image = CaptionedImage(path, path.name, "", width, height, moving=moving)
    pixels = load_image(image, BUCKET)
    assert pixels.shape == (BUCKET[1], BUCKET[0], 3) and 0 <= pixels.min() and pixels.max() <= 1
    mask = load_mask(image, BUCKET, alpha=True)
    assert mask is None or (mask.shape == (BUCKET[1], BUCKET[0]) and 0 <= mask.min() and mask.max() <= 1)
    return image


def test_sound_images_of_all_formats_and_modes_are_read(tmp_path: Path) -> None:
    files = whole_files()
    for number, (suffix, data) in enumerate(files):
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(data)
        assert decode(path).size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH))
    assert len(files) > 80


def test_damaged_images_give_pixels_or_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_PIXELS", 1_000_000)  # below the real one, a size that is wrong takes long
    read = refused = 0
    for number, (suffix, data) in enumerate(damaged_files(seed=18, count=COUNT)):
        path = tmp_path / f"image.{suffix}"
        path.write_bytes(data)
        begun = time.perf_counter()
        try:
            decode(path)
            read += 1
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path.name} was skipped: "), (number, error)
            assert str(tmp_path) not in str(error) and "\n" not in str(error) and len(str(error)) < 400, (number, error)
        assert time.perf_counter() - begun < MAX_SECONDS, number
    assert read > COUNT / 10 and refused > COUNT / 10
