"""A captioned image, and the result of scanning a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptionedImage:
    """An image file with its caption; only its header has been read."""

    path: Path
    name: str  # path inside the scanned folder, with "/"
    caption: str  # with the trigger word; empty only if there is none of both
    width: int  # pixels, once upright
    height: int
    repeats: int = 1  # how often it counts in an epoch, from a subfolder named N_name
    mask: Path | None = None  # file that says which parts of the image are learned
    other_captions: tuple[str, ...] = ()  # further ones, of which each epoch shows one
    has_caption: bool = True  # besides the trigger word
    moving: bool = False  # whether the file has further frames or pages, which are not used

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height


@dataclass(frozen=True)
class Scan:
    """What `scan_folder` found."""

    images: tuple[CaptionedImage, ...]  # in natural order: the folder itself, then its subfolders
    problems: tuple[str, ...]  # a sentence for each image that was skipped
    unmatched_masks: tuple[str, ...] = ()  # names of masks without an image
    unused: tuple[str, ...] = ()  # sentences that name other files and folders that are not used
