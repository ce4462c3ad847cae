"""Captions: finding and reading the text files beside the images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .names import ByName

CAPTION_SUFFIXES = (".txt", ".caption")  # the first that exists is read
MAX_FILE_SIZE = 64 << 10  # bytes that are read of a caption file; a larger one is none
MAX_LENGTH = 10_000  # characters of a caption, some 2,500 tokens: no text encoder makes sense of more
MAX_CAPTIONS = 100  # in one file

CaptionLines = Literal["one per epoch", "joined"]  # what the lines of a caption file are


@dataclass(frozen=True)
class ImageFiles:
    """The files of one image, found by name; none of them has been opened."""

    path: Path
    name: str  # path inside the scanned folder, with "/"
    caption: Path | None
    repeats: int
    mask: Path | None = None


def match_captions(images: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Match images with their caption files: rocket.txt or rocket.caption, else rocket.png.txt, for rocket.png.

    Args:
        images: file names of images.
        files: the names of all files beside them.

    Returns:
        The name of the caption file of each image that has one, by the image's name.
    """
    names = sorted(files)
    stems = []
    for wanted in CAPTION_SUFFIXES:
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == wanted:
                stems.append((stem, name))
    captions = ByName(stems)
    found = {image: captions.get(os.path.splitext(image)[0]) or captions.get(image) for image in images}
    return {image: caption for image, caption in found.items() if caption is not None}


def read_captions(files: ImageFiles, lines: CaptionLines = "one per epoch") -> tuple[str, ...]:
    """Read an image's captions, with runs of whitespace collapsed and letters in Unicode's composed form (NFC).

    Args:
        files: of the image.
        lines: whether each line is a caption of its own, or all lines together are one.

    Returns:
        The captions, none of them empty; nothing if there is no file or no text in it.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, is too large, or holds a caption that is too long.
    """
    if files.caption is None:
        return ()
    text = decode(read_bounded(files.name, files.caption), files.name, files.caption.name)
    return split_captions(text, files.name, files.caption.name, lines)


def split_captions(text: str, image: str, caption: str, lines: CaptionLines = "one per epoch") -> tuple[str, ...]:
    """Return the captions in the text of a file, none of them empty.

    Args:
        text: what the file holds.
        image: name of the image, for the message.
        caption: name of the file, for the message.
        lines: whether each line is a caption of its own, or all lines together are one.

    Raises:
        ValueError: there are too many lines, or a caption is too long.
    """
    written = [line for line in map(clean_text, text.splitlines()) if line]
    captions = written if lines == "one per epoch" else [" ".join(written)] if written else []
    if len(written) > MAX_CAPTIONS:
        raise ValueError(
            f"The caption {caption} of {image} has {len(written)} lines, more than {MAX_CAPTIONS}: keep the best of "
            "them, or move the file out of the folder if it is not a caption."
        )
    if any(len(each) > MAX_LENGTH for each in captions):
        raise ValueError(
            f"The caption {caption} of {image} is longer than {MAX_LENGTH:,} characters, more than a text encoder can "
            "make sense of: shorten it, or move the file out of the folder if it is not a caption."
        )
    return tuple(captions)


def clean_text(text: str) -> str:
    """Return a text as people type it: whitespace collapsed, and é as one character rather than as two."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_bounded(image: str, caption: Path) -> bytes:
    """Return the content of an image's caption file. Raises ValueError if it cannot be read, or is too large."""
    try:
        with open(caption, "rb") as file:
            data = file.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        raise ValueError(
            f"The caption of {image} cannot be read ({error.strerror}). Check the file {caption.name}."
        ) from error
    if len(data) > MAX_FILE_SIZE:
        raise ValueError(
            f"The caption {caption.name} of {image} is larger than {MAX_FILE_SIZE >> 10} KB: shorten it, or move it "
            "out of the folder if it is not a caption."
        )
    return data


def decode(data: bytes, image: str, caption: str) -> str:
    """Return the text of an image's caption file. Raises ValueError if it is not UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(image, caption) from error
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8, with a zero after each letter
        raise _not_utf8(image, caption)
    return text


def _not_utf8(image: str, caption: str) -> ValueError:
    return ValueError(
        f"The caption {caption} of {image} is not UTF-8 text: open it in an editor and save it again as UTF-8."
    )
