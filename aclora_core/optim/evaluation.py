"""Weights to evaluate and to save, which may be an average of the weights that training continues from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..lora import FlatParameters
from .ema import Ema
from .flat_optimizer import FlatOptimizer


class EvaluationWeights:
    """Puts the EMA, or the average that a schedule-free optimizer keeps, in place of the training weights."""

    def __init__(self, weights: FlatParameters, optimizer: FlatOptimizer, ema: Ema | None) -> None:
        self._weights = weights
        self._optimizer = optimizer
        self._ema = ema
        self._kept = False

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap in the evaluation weights, and restore the training weights on exit."""
        if self._kept or not (self._ema or self._optimizer.spec.averages_weights):
            yield
            return
        before = self._weights.master.clone()
        self._swap_in()
        try:
            yield
        finally:
            self._optimizer.train_mode()
            with torch.no_grad():
                self._weights.master.copy_(before)
            self._weights.refresh()

    def keep(self) -> None:
        """Swap in the evaluation weights for good; training cannot continue. Further calls change nothing."""
        if not self._kept:
            self._swap_in()
            self._kept = True

    @torch.no_grad()
    def _swap_in(self) -> None:
        self._optimizer.eval_mode()
        if self._ema:
            self._weights.master.copy_(self._ema.value)
        self._weights.refresh()
