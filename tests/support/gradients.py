"""The gradient of a training's micro-batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def gradient(trainer: Any, batches: Iterable[Any]) -> torch.Tensor:
    """Return the summed gradient of micro-batches, flat; the trainer is ready."""
    parameters = trainer.adapted.parameters
    parameters.gradient.zero_()
    for batch in batches:
        trainer.adapted.loss(batch)[0].backward()
    return parameters.gradient.clone()
