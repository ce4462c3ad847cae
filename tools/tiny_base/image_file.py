"""The base's training images in one file, so that it can be trained where there is neither npm nor a network.

The file is a zip with index.json (concepts and style words, in the order of the images) and images/00000.webp,
lossless.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

_INDEX = "index.json"
_NO_DATE = (1980, 1, 1, 0, 0, 0)  # makes the file reproducible


def write(path: Path, images: np.ndarray, concepts: Sequence[str], styles: Sequence[str]) -> None:
    """Write images uint8 (n, h, w, 3) with their concepts and style words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive, ThreadPoolExecutor() as pool:
        index = {"concepts": list(concepts), "styles": list(styles)}
        archive.writestr(zipfile.ZipInfo(_INDEX, _NO_DATE), json.dumps(index))
        for number, file in enumerate(pool.map(_webp, images)):
            archive.writestr(zipfile.ZipInfo(_name(number), _NO_DATE), file)


def read(path: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Return what write was given."""
    with zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read(_INDEX))
        files = [archive.read(_name(number)) for number in range(len(index["concepts"]))]
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(_pixels, files)))
    return images, index["concepts"], index["styles"]


def _name(number: int) -> str:
    return f"images/{number:05}.webp"


def _webp(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
