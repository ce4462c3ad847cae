"""Scores of models that were trained on what people prefer: ImageReward and HPS, where their packages are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...aclora_core.evaluation import Row, scores_row
from ...aclora_core.storage import to_pil
from .. import host

Scorer = Callable[[str, Image.Image], float]


def preference_rows(
    prompts: Sequence[str], drawn: Sequence[Tensor], base: Sequence[Tensor] | None, advance: Callable[[int], None]
) -> list[Row]:
    """Return a row for each model; one whose package is missing, or without prompts, says so.

    Args:
        prompts: one for each drawn image, or none.
        drawn: images (height, width, 3).
        base: of the same prompts, or None.
        advance: called with the number of images that were finished.
    """
    return [_row(name, package, load, prompts, drawn, base, advance) for name, (package, load) in _MODELS.items()]


def _row(
    name: str,
    package: str,
    load: Callable[[Any], Scorer],
    prompts: Sequence[str],
    drawn: Sequence[Tensor],
    base: Sequence[Tensor] | None,
    advance: Callable[[int], None],
) -> Row:
    if not prompts:
        return Row(name, "higher", missing="needs the prompts of the drawn images")
    try:
        score = load(importlib.import_module(package))
    except ImportError as error:
        return Row(name, "higher", missing=f"needs a Python package that is not installed, {error.name or package}")

    def scores(images: Sequence[Tensor]) -> Tensor:
        found = []
        for prompt, image in zip(prompts, images, strict=True):
            host.raise_if_cancelled()
            found.append(score(prompt, to_pil(image)))
            advance(1)
        return torch.tensor(found, dtype=torch.float64)

    return scores_row(name, scores(drawn), scores(base) if base else None)


def _image_reward(package: Any) -> Scorer:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977)."""
    model = package.load("ImageReward-v1.0")
    return lambda prompt, image: float(model.score(prompt, [image]))


def _hps(package: Any) -> Scorer:
    """HPS v2.1 (Wu et al. 2023, arXiv 2306.09341)."""
    return lambda prompt, image: float(np.asarray(package.score([image], prompt, hps_version="v2.1")).reshape(-1)[0])


_MODELS: dict[str, tuple[str, Callable[[Any], Scorer]]] = {
    "ImageReward": ("ImageReward", _image_reward),
    "HPS v2.1": ("hpsv2", _hps),
}
