"""The images of the benchmark: a few training images of each style, and others to test on ("verdict"), in one file.

The file is a zip with index.json and the PNGs STYLE/training/000.png and STYLE/verdict/000.png, so the benchmark runs
without a network.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny_base import icons

# Styles that the tiny base was not trained on, as different from each other as the icon sets allow: black shapes,
# outlines, soft gradients, flat colour.
STYLES = ("fluent-emoji-high-contrast", "openmoji", "noto-v1", "fxemoji")
_INDEX = "index.json"
_SPARE = 16  # additional images, in case two concepts have the same drawing
_NO_DATE = (1980, 1, 1, 0, 0, 0)  # makes the file reproducible


@dataclass(frozen=True, eq=False)
class Part:
    """Some images of a style, with their captions."""

    images: np.ndarray  # uint8 (n, 128, 128, 3)
    captions: list[str]


@dataclass(frozen=True, eq=False)
class Style:
    """The training images and the test images ("verdict") of a style."""

    training: Part
    verdict: Part


def in_random_order(concepts: Sequence[str], seed: int) -> list[str]:
    """Return each concept once, in an order that depends on the seed only."""
    different = sorted(set(concepts))
    return random.Random(seed).sample(different, len(different))


def split_indices(concepts: Sequence[str], drawings: Sequence[bytes], training: int, verdict: int) -> list[list[int]]:
    """Return the indices of the training images and of the test images; no concept and no drawing occurs twice.

    Raises:
        ValueError: there are too few different ones.
    """
    seen: set[str | bytes] = set()
    kept = []
    for index, (concept, drawing) in enumerate(zip(concepts, drawings, strict=True)):
        if concept not in seen and drawing not in seen:
            kept.append(index)
        seen |= {concept, drawing}
    if len(kept) < training + verdict:
        raise ValueError(
            f"There are {len(kept)} different drawings, but {training} for training and {verdict} for testing were "
            "requested. Set --training and --verdict lower, or choose another style."
        )
    return [kept[:training], kept[training : training + verdict]]


def draw_style(cache: Path, style: str, training: int, verdict: int, seed: int) -> Style:
    """Draw the images of a style, of concepts that the tiny base knows by name."""
    if style not in icons.HELD_OUT_STYLES:
        raise KeyError(
            f"The tiny base was trained on {style!r}, or there is no such style. Choose one of: "
            f"{', '.join(icons.HELD_OUT_STYLES)}"
        )
    drawn = icons.load_set(cache, style)
    known = icons.load_set(cache, icons.REFERENCE)
    concepts = in_random_order([concept for concept in drawn if concept in known], seed)[: training + verdict + _SPARE]
    images = icons.render_many([drawn[concept] for concept in concepts])
    captions = [icons.caption(concept, "").rsplit(",", 1)[0] for concept in concepts]  # without the style's name
    chosen = split_indices(concepts, [image.tobytes() for image in images], training, verdict)
    training_part, verdict_part = (Part(images[indices], [captions[i] for i in indices]) for indices in chosen)
    return Style(training_part, verdict_part)


def prepare(cache: Path, path: Path, styles: Sequence[str], training: int, verdict: int, seed: int) -> None:
    """Fetch the icon sets, draw the images and write the file."""
    icons.fetch(cache, [*styles, icons.REFERENCE])
    write(path, {style: draw_style(cache, style, training, verdict, seed) for style in styles})


def write(path: Path, styles: dict[str, Style]) -> None:
    """Write the styles into a file."""
    index: dict[str, dict[str, list[str]]] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, style in styles.items():
            index[name] = {}
            for kind, part in (("training", style.training), ("verdict", style.verdict)):
                index[name][kind] = part.captions
                for number, image in enumerate(part.images):
                    archive.writestr(zipfile.ZipInfo(f"{name}/{kind}/{number:03}.png", _NO_DATE), _png(image))
        archive.writestr(zipfile.ZipInfo(_INDEX, _NO_DATE), json.dumps(index, indent=1, ensure_ascii=False))


def read(path: Path) -> dict[str, Style]:
    """Read the styles of a file, in its order."""
    with zipfile.ZipFile(path) as archive:

        def part(name: str, kind: str, captions: list[str]) -> Part:
            files = [archive.read(f"{name}/{kind}/{number:03}.png") for number in range(len(captions))]
            return Part(np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]), captions)

        index = json.loads(archive.read(_INDEX))
        return {
            name: Style(*(part(name, kind, captions[kind]) for kind in ("training", "verdict")))
            for name, captions in index.items()
        }


def digest(styles: dict[str, Style]) -> str:
    """Return a hash of the images and captions, so results on different images are never joined."""
    found = hashlib.sha256()
    for name, style in styles.items():
        for part in (style.training, style.verdict):
            found.update(json.dumps([name, part.captions]).encode() + part.images.tobytes())
    return found.hexdigest()[:16]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
