"""The contact sheets on the dataset node, and the pack's routes outside a server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aclora_core.dataset import CaptionedImage
from tests.support.dataset_calls import draw


@pytest.fixture
def images(tmp_path: Path) -> Iterator[list[CaptionedImage]]:
    """Hundred small images with captions."""
    found = []
    for number in range(100):
        draw(tmp_path / f"{number}.png", number)
        found.append(CaptionedImage(tmp_path / f"{number}.png", f"{number}.png", f"image {number}", 96, 64))
    yield found


def folder_of(pack: ModuleType, images: list[CaptionedImage], **masks: Any) -> Any:
    encode = pack.nodes.dataset.encode
    encoded = {image: encode.EncodedImage([(80, 48)], {}, {}) for image in images}
    return encode.EncodedFolder(encoded, masks)


def sheets_of(pack: ModuleType, folder: Any) -> tuple[Any, int]:
    """Return the sheets, and how far the progress bar went."""
    steps: list[int] = []
    return pack.nodes.dataset.sheets.contact_sheets(folder, steps.append, dark=False), sum(steps)


@pytest.mark.parametrize(("count", "sheets"), [(1, 1), (16, 1), (17, 2), (33, 3), (96, 6), (100, 6)])
def test_all_images_are_shown_on_sheets_of_equal_size(
    pack: ModuleType, images: list[CaptionedImage], count: int, sheets: int
) -> None:
    found, done = sheets_of(pack, folder_of(pack, images[:count]))
    assert found.ndim == 4 and found.shape[0] == sheets and found.shape[3] == 3
    assert done == min(count, 96)
    (sentence,) = pack.nodes.dataset.messages.not_shown(folder_of(pack, images[:count])) or [""]
    assert ("first 96 of 100" in sentence) == (count == 100)


def test_an_image_that_was_deleted_is_left_out(pack: ModuleType, images: list[CaptionedImage]) -> None:
    images[0].path.unlink()
    both, _ = sheets_of(pack, folder_of(pack, images[:2]))
    alone, _ = sheets_of(pack, folder_of(pack, images[1:2]))
    assert both.shape == alone.shape
    images[1].path.unlink()
    assert sheets_of(pack, folder_of(pack, images[:2])) == (None, 2)


def test_masked_out_parts_are_pale(pack: ModuleType, images: list[CaptionedImage]) -> None:
    folder = folder_of(pack, images[:1])
    plain, _ = sheets_of(pack, folder)
    folder.masks[images[0]] = {(80, 48): torch.zeros(48, 80)}
    masked, _ = sheets_of(pack, folder)
    assert masked.mean() > plain.mean() + 0.05


def test_remarks_say_what_is_particular(pack: ModuleType, tmp_path: Path) -> None:
    image = CaptionedImage(tmp_path, "x", "", 40, 200, repeats=3, has_caption=False, moving=True)
    remarks = pack.nodes.dataset.sheets.image_remarks(image, (64, 64))
    assert remarks == ["no caption", "scaled up", "80% cropped", "first frame only", "counts 3 times"]


def test_the_pack_loads_where_there_is_no_web_server(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server", raising=False)
    asyncio.run(pack.nodes.compatibility.load_extension().on_load())
