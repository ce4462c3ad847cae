"""The images of the study, in one file: training and test images of eight styles, and all real images for the judge.

The file is a zip with the styles as bench/no_search/images.py writes them, and judge/: every image of all twelve icon
sets at 64 × 64, with the number of its concept and of its style. So the study runs without a network.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.no_search import images
from tools.tiny_base import icons, judge
from tools.tiny_base.icon_sets import ALL_STYLES, HELD_OUT_STYLES

TRAINING, VERDICT = 48, 96  # images of each style; the study learns from the first 16
INDEX, _IMAGES = "judge/index.json", "judge/images"
_QUALITY = 82  # of WEBP; the judge sees them shifted, blurred and noisy in any case


@dataclass(frozen=True, eq=False)
class JudgeImages:
    """The images that the classifier learns from."""

    images: np.ndarray  # uint8 (n, 64, 64, 3)
    concepts: list[int]  # (n,), into names
    styles: list[int]  # (n,), into style_names
    names: list[str]
    style_names: list[str]

    def concepts_of(self, captions: list[str]) -> list[int]:
        """Return the number of the concept that each caption asks for.

        Raises:
            KeyError: a caption asks for none of the concepts.
        """
        numbers = {_caption(name): number for number, name in enumerate(self.names)}
        return [numbers[caption] for caption in captions]


def _caption(concept: str) -> str:
    return icons.caption(concept, "").rsplit(",", 1)[0]  # without the style's name, as in the training images


def prepare(cache: Path, path: Path, training: int = TRAINING, verdict: int = VERDICT, seed: int = 0) -> None:
    """Fetch all icon sets, draw the images and write the file."""
    images.prepare(cache, path, list(HELD_OUT_STYLES), training, verdict, seed)
    icons.fetch(cache)
    sets = {style: icons.load_set(cache, style) for style in ALL_STYLES}
    names = sorted({concept for drawn in sets.values() for concept in drawn})
    numbers = {name: number for number, name in enumerate(names)}
    files: list[bytes] = []
    concepts, styles = [], []
    for number, drawn in enumerate(sets.values()):
        files += [_webp(image) for image in icons.render_many(list(drawn.values()), judge.SIZE)]
        concepts += [numbers[concept] for concept in drawn]
        styles += [number] * len(drawn)
    index = {
        "names": names,
        "style_names": list(sets),
        "concepts": concepts,
        "styles": styles,
        "bytes": [len(file) for file in files],
    }
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(INDEX, json.dumps(index))
        archive.writestr(_IMAGES, b"".join(files))


def read_judge(path: Path) -> JudgeImages:
    """Read the classifier's images from the file."""
    with zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read(INDEX))
        stream = io.BytesIO(archive.read(_IMAGES))
    decoded = [np.asarray(Image.open(io.BytesIO(stream.read(count))).convert("RGB")) for count in index.pop("bytes")]
    return JudgeImages(np.stack(decoded), **index)


def _webp(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue()
