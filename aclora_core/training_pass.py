"""One pass of training from a fresh adapter: batches, steps, and restarts that find out which components are signal."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import lora
from .adapter_file import Adapter
from .adapter_restart import LayerRestart, Mode, restart_adapter
from .batches import Batch, endless_batches, largest_batch, make_batch, steps_per_epoch
from .block_memory import BlockMemory
from .config import TrainConfig
from .graphs import Graphs, moved
from .model import Model
from .objective import denoising_losses, draw_sigmas
from .out_of_place import OutOfPlace, is_in_place_error
from .report import Restart
from .restart import dynamic_threshold, is_restart_epoch
from .stepping import Stepper

if TYPE_CHECKING:
    from .training import Progress

log = logging.getLogger("aclora")
_MOST_SKIPPED = 10  # steps in a row without a finite loss, after which going on is pointless


class TrainingPass:
    """The state of a training; each call of step goes one step on and writes it down in the progress.

    pictures: the numbers of those to learn from. unit: what losses are divided by. steps: how many are planned.
    """

    def __init__(
        self, model: Model, config: TrainConfig, pictures: Sequence[int], unit: float, progress: Progress, steps: int
    ) -> None:
        self.model, self.config, self.unit, self.progress = model, config, unit, progress
        self._pictures, self._on_gpu = pictures, model.device.type == "cuda"
        self.generator = torch.Generator().manual_seed(config.seed)
        self.noises = torch.Generator(model.device).manual_seed(config.seed)  # drawn where it is used: there it is fast
        self.layers = lora.find_layers(model.network, config.layers, model.prefix)
        self.weights = lora.make_weights(
            self.layers, config.max_rank, config.alpha, self.generator, model.device, model.dtype
        )
        self.graphs = Graphs(model.device, config.graph)
        self.memory = BlockMemory(model.network)
        self.stepper = Stepper(
            self.weights, self._loss, self.graphs, config.learning_rate, config.weight_decay, config.max_norm
        )
        per_epoch = steps_per_epoch(pictures, model.groups, config.batch_size)
        self.total_epochs = max(1, steps // per_epoch)
        self._order = endless_batches(pictures, model.groups, config.batch_size, self.generator)
        self._restarted_at = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Puts the adapter on the model for as long as the context lasts."""
        with lora.attached(self.layers, self.weights.branches, self.model.is_plain), self.memory.attached():
            self._try()
            self._fit_memory()
            yield

    def adapter(self) -> Adapter:
        """The adapter as it is, in main memory."""
        return Adapter({name: branch.layer() for name, branch in self.weights.branches.items()})

    def step(self) -> None:
        """Takes the next batch, and restarts the adapter where an interval ends.

        Raises:
            FloatingPointError: this was the tenth step in a row without a finite loss.
        """
        epoch, epoch_ends, pictures = next(self._order)
        losses = self.progress.losses
        losses.append(self._fitting_step(self._draw(pictures, self.generator)) / self.unit)
        if self.stepper.skipped_in_a_row >= _MOST_SKIPPED:
            raise FloatingPointError(
                f"The loss has not been a finite number for {_MOST_SKIPPED} steps, up to step {len(losses)}. Lower the "
                "learning rate, or load the model in bf16 or fp32."
            )
        due = self.config.mode != "off" and is_restart_epoch(epoch, self.config.restart_every, self.total_epochs)
        if epoch_ends and due:
            self._restart_if_known(epoch)

    def _draw(self, pictures: Sequence[int], generator: torch.Generator) -> Batch:
        """A batch of these pictures with fresh noise and noise levels."""
        shape = (len(pictures), *self.model.latents[pictures[0]].shape[1:])
        noise = torch.randn(shape, generator=generator)
        sigma = draw_sigmas(self.model.objective, len(pictures), generator)
        return make_batch(self.model, pictures, noise, sigma, 1 / len(pictures))

    def _fitting_step(self, batch: Batch) -> float:
        """One step; when it does not fit, once more with every block computed twice."""
        try:
            return self.stepper.step([batch])
        except torch.cuda.OutOfMemoryError:
            if self.config.checkpointing != "automatic" or not self.memory.all_again():
                raise
        log.info("AC-LoRA: out of memory. Each block is computed twice from now on, which needs less and is slower.")
        self.graphs.clear()
        self.stepper.clear_gradients()
        return self.stepper.step([batch])

    def _try(self) -> None:
        """One way there and back with one picture, so that a model that cannot be trained fails before the work."""
        batch = moved(self._draw(self._pictures[:1], torch.Generator().manual_seed(0)), self.model.device)
        if self.config.checkpointing == "all" or (self.config.checkpointing == "automatic" and self._on_gpu):
            self.memory.all_again()
        try:
            self._loss(batch).backward()
        except RuntimeError as error:
            if not is_in_place_error(error):
                raise
            self.memory.out_of_place = True
            self._loss(batch).backward()
        self.stepper.clear_gradients()
        if self.config.checkpointing == "automatic":
            self.memory.again.clear()

    def _fit_memory(self) -> None:
        """Sees to it that the largest batch fits, and says what it takes."""
        if self.config.checkpointing != "automatic" or not self._on_gpu:
            return
        rows, picture = largest_batch(self._pictures, self.model, self.config.batch_size)
        row = moved(self._draw([picture], torch.Generator().manual_seed(0)), self.model.device)
        kept = self.memory.measure(lambda: denoising_losses(self.model, row))
        free = self.model.free_memory(kept.peak(rows, set()))
        if free is not None:
            expected = self.memory.fit(kept, rows, free)
            log.info(
                "AC-LoRA: a step takes some %.1f GB of %.1f GB free; %d of %d blocks are computed twice for that.",
                expected / 1e9, free / 1e9, len(self.memory.again), len(self.memory.blocks),
            )  # fmt: skip

    def _loss(self, batch: Batch) -> Tensor:
        with OutOfPlace() if self.memory.out_of_place else nullcontext():
            return (denoising_losses(self.model, batch) * batch.weight).sum()

    def _restart_if_known(self, epoch: int) -> None:
        """Restarts, if there was a finite loss since the last time: else nothing tells how much is signal."""
        losses = self.progress.losses
        since = [loss for loss in losses[self._restarted_at :] if math.isfinite(loss)]
        if since:
            self.progress.restarts.append(self._restart(epoch, sum(since) / len(since)))
            self._restarted_at = len(losses)

    def _restart(self, epoch: int, loss: float) -> Restart:
        """Splits every layer into signal and noise and draws the noise afresh (AC-LoRA Eq. 2, 3, 5, 6)."""
        threshold = self._threshold(epoch, loss)
        branches = self.weights.branches
        parts = {name: (branch.lora_down, branch.lora_up, branch.scale) for name, branch in branches.items()}
        mode: Mode = self.config.mode  # type: ignore[assignment]
        results = restart_adapter(parts, threshold, self.noises, mode, self.config.measure)
        self.weights.refresh()
        if self.config.clear_moments:
            self.stepper.forget(_redrawn(parts, results))
        ranks = {name: result.rank for name, result in results.items()}
        return Restart(len(self.progress.losses), epoch, loss, math.nan if threshold is None else threshold, ranks)

    def _threshold(self, epoch: int, loss: float) -> float | None:
        """The share of a matrix that is signal; None for the noise floor."""
        config = self.config
        if config.threshold == "dynamic":
            limits = config.lowest_threshold, config.highest_threshold
            return dynamic_threshold(loss, min(epoch, self.total_epochs), self.total_epochs, *limits)
        return config.fixed_threshold if config.threshold == "fixed" else None


def _redrawn(parts: dict[str, Any], results: dict[str, LayerRestart]) -> Iterator[Tensor]:
    for name, result in results.items():
        down, up, _ = parts[name]
        if result.redrawn_down:
            yield down
        if result.redrawn_up:
            yield up
