"""The images of the test: of each style a few to learn from and others for the verdict, in one file.

The file is a zip with index.json and PNGs, STYLE/training/000.png and STYLE/verdict/000.png, so that the test can run
where there is no network.
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

# Four that the tiny base was not trained on, as unlike each other as the sets allow: black shapes, outlines, soft
# gradients, flat colour.
STYLES = ("fluent-emoji-high-contrast", "openmoji", "noto-v1", "fxemoji")
_INDEX = "index.json"
_SPARE = 16  # drawn besides, in case that two names have one drawing
_NO_DATE = (1980, 1, 1, 0, 0, 0)  # the same file every time


@dataclass(frozen=True, eq=False)
class Part:
    """Some images of a style, with their captions."""

    images: np.ndarray  # uint8 (n, 128, 128, 3)
    captions: list[str]


@dataclass(frozen=True, eq=False)
class Style:
    """What is learned from, and what the verdict is measured on."""

    training: Part
    verdict: Part


def in_random_order(concepts: Sequence[str], seed: int) -> list[str]:
    """Each concept once, in an order that follows from the seed alone."""
    different = sorted(set(concepts))
    return random.Random(seed).sample(different, len(different))


def shared_out(concepts: Sequence[str], drawings: Sequence[bytes], training: int, verdict: int) -> list[list[int]]:
    """Places of the images to learn from and of those for the verdict, the first ones that will do.

    No concept and no drawing is in it twice.

    Raises:
        ValueError: there are too few different ones.
    """
    seen: set[str | bytes] = set()
    kept = []
    for place, (concept, drawing) in enumerate(zip(concepts, drawings, strict=True)):
        if concept not in seen and drawing not in seen:
            kept.append(place)
        seen |= {concept, drawing}
    if len(kept) < training + verdict:
        raise ValueError(
            f"There are {len(kept)} different drawings, but {training} to learn from and {verdict} for the verdict "
            "are wanted. Ask for fewer, or choose another style."
        )
    return [kept[:training], kept[training : training + verdict]]


def draw_style(cache: Path, style: str, training: int, verdict: int, seed: int) -> Style:
    """Images of a style, of things that the tiny base knows by name."""
    if style not in icons.HELD_OUT_STYLES:
        raise KeyError(
            f"The tiny base was trained on {style!r}, or there is no such style. These can be used: "
            f"{', '.join(icons.HELD_OUT_STYLES)}"
        )
    drawn = icons.load_set(cache, style)
    known = icons.load_set(cache, icons.REFERENCE)
    concepts = in_random_order([concept for concept in drawn if concept in known], seed)[: training + verdict + _SPARE]
    images = icons.render_many([drawn[concept] for concept in concepts])
    captions = [icons.caption(concept, "").rsplit(",", 1)[0] for concept in concepts]  # without the style's name
    chosen = shared_out(concepts, [image.tobytes() for image in images], training, verdict)
    first, second = (Part(images[places], [captions[place] for place in places]) for places in chosen)
    return Style(first, second)


def prepare(cache: Path, path: Path, styles: Sequence[str], training: int, verdict: int, seed: int) -> None:
    """Fetches the icon sets, draws the images and writes the file."""
    icons.fetch(cache, [*styles, icons.REFERENCE])
    write(path, {style: draw_style(cache, style, training, verdict, seed) for style in styles})


def write(path: Path, styles: dict[str, Style]) -> None:
    """The styles as a file."""
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
    """The styles of a file, in its order."""
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
    """The same for the same images and captions, so that results of different images are never joined."""
    found = hashlib.sha256()
    for name, style in styles.items():
        for part in (style.training, style.verdict):
            found.update(json.dumps([name, part.captions]).encode() + part.images.tobytes())
    return found.hexdigest()[:16]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
