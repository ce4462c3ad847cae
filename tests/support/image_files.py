"""Image files for the tests of the dataset room."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from aclora_core.dataset.folder import scan_folder
from aclora_core.dataset.image import CaptionedImage


def save_image(
    path: Path, size: tuple[int, int] = (64, 64), color: str | tuple[int, ...] = "red", **options: object
) -> Path:
    """Save an image of one colour; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def two_halves(width: int = 80, height: int = 40) -> Image.Image:
    """An image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def scanned_image(path: Path) -> CaptionedImage:
    """The image as a scan of its folder finds it."""
    (found,) = (image for image in scan_folder(path.parent).images if image.path == path)
    return found
