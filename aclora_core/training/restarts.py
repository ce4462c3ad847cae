"""AC-LoRA's restarts while a training runs: when one is due, its threshold, and what becomes of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import Restart
from ..config import TrainConfig
from ..distributed import ALONE, Processes
from ..lora import FlatParameters
from ..method import (
    LayerRestart,
    Mode,
    SignalThreshold,
    dynamic_threshold,
    is_restart_epoch,
    restart_adapter,
    scheduled_threshold,
)
from ..optim import Stepper
from .batches import StepBatches


class Restarts:
    """Restarts the adapter every few epochs or steps: keeps each layer's signal and redraws its noise (AC-LoRA Eq. 2).

    Args:
        config: the settings; mode "off" never restarts.
        total_epochs: planned for this pass.
        total_steps: planned for this pass.
        device: where the new noise is drawn.
        processes: that restart together.
    """

    def __init__(
        self,
        config: TrainConfig,
        total_epochs: int,
        total_steps: int,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.config = config
        self._processes = processes
        self.total = total_steps if config.restart_steps else total_epochs  # in the unit of _done
        self.generator = torch.Generator(device).manual_seed(config.seed)  # on the device, where drawing is fast
        self._last_step = 0  # of the last restart
        self._without_style: list[int] = []  # steps since then whose loss is not that of the style

    def is_due(self, batches: StepBatches, step: int) -> bool:
        """Return whether the adapter restarts after this step. step: its number, from 1."""
        config = self.config
        if config.mode == "off" or not (config.restart_steps or batches.ends_epoch):
            return False
        interval = config.restart_steps or config.restart_every
        return is_restart_epoch(self._done(batches.epoch, step), interval, self.total)

    def _done(self, epoch: int, step: int) -> int:
        """Return how far the training is, in the unit that restarts are counted in: epochs or steps."""
        return step if self.config.restart_steps else epoch

    def leave_out(self, step: int) -> None:
        """Leave the loss of a step out of the mean that sets the threshold."""
        self._without_style.append(step)

    def apply(
        self, parameters: FlatParameters, stepper: Stepper, epoch: int, losses: Sequence[float]
    ) -> Restart | None:
        """Restart every layer in place, and return what each kept.

        Returns None, with nothing changed, where no finite loss since the last restart tells how much is signal.

        Args:
            parameters: the adapter's weights.
            stepper: whose optimizer state of redrawn factors is reset.
            epoch: of the step that was just taken, from 1.
            losses: of all steps of this pass, relative to the mean target.
        """
        steps = range(self._last_step, len(losses))
        known = [losses[step] for step in steps if math.isfinite(losses[step]) and step not in self._without_style]
        if not known:
            return None
        loss = sum(known) / len(known)
        threshold = self._threshold(self._done(epoch, len(losses)), loss)
        layers = {name: (it.lora_down, it.lora_up, it.scale) for name, it in parameters.layers.items()}
        mode: Mode = self.config.mode  # type: ignore[assignment]  # "off" is never due
        results = restart_adapter(layers, threshold, self.generator, mode, self.config.measure)
        self._processes.copy_from_first_(parameters.master)  # other devices may round singular values otherwise
        parameters.refresh()
        if self.config.clear_moments:
            stepper.reset_state(_redrawn_factors(layers, results))
        redrawn = [name for name, result in results.items() if result.redrawn_down or result.redrawn_up]
        stepper.restart_ema(factor for name in redrawn for factor in layers[name][:2])
        self._last_step, self._without_style = len(losses), []
        ranks = {name: result.rank for name, result in results.items()}
        return Restart(len(losses), epoch, loss, threshold, ranks)

    def _threshold(self, done: int, loss: float) -> SignalThreshold:
        """Return the share of a spectrum that is signal, or "noise floor". done: in epochs or steps."""
        config = self.config
        limits = config.lowest_threshold, config.highest_threshold
        if config.threshold == "dynamic":
            return dynamic_threshold(loss, min(done, self.total), self.total, *limits)
        if config.threshold == "scheduled":
            return scheduled_threshold(min(done, self.total), self.total, *limits)
        return config.fixed_threshold if config.threshold == "fixed" else "noise floor"

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {
            "noises": self.generator.get_state(),
            "restarted_at": self._last_step,
            "silent": self._without_style,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.generator.set_state(state["noises"])
        self._last_step = state["restarted_at"]
        self._without_style = list(state.get("silent", []))


def _redrawn_factors(
    layers: Mapping[str, tuple[Tensor, Tensor, float]], results: Mapping[str, LayerRestart]
) -> Iterator[Tensor]:
    for name, result in results.items():
        lora_down, lora_up, _ = layers[name]
        if result.redrawn_down:
            yield lora_down
        if result.redrawn_up:
            yield lora_up
