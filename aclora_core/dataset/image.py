"""A captioned image, and what a scan of a folder finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptionedImage:
    path: Path  # the file
    name: str  # its path inside the scanned folder, with "/"
    caption: str  # may be empty when there is no trigger word either
    width: int  # in pixels, after EXIF rotation
    height: int
    repeats: int = 1  # how often it counts in an epoch, from a subfolder named N_name
    mask: Path | None = None  # the file that says what of it is learned

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


@dataclass(frozen=True)
class Scan:
    pictures: tuple[CaptionedImage, ...]  # in natural order: the folder itself, then its subfolders
    problems: tuple[str, ...]  # a sentence for each picture that was left out
    spare_masks: tuple[str, ...] = ()  # names of masks without a picture
