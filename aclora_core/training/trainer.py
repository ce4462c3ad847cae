"""One pass of a training: everything that a step needs, from batches to restarts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..config import TrainConfig
from ..diffusion import DiffusionModel, TrainingSet
from ..distributed import ALONE, Processes
from ..optim import Stepper, learning_rate_at
from .activity import OnActivity, ignore
from .adapted_model import AdaptedModel
from .batches import BatchStream
from .memory import MemoryPlan
from .progress import Progress
from .restarts import Restarts
from .sampler import images_per_step
from .too_little_memory import TooLittleMemoryError, bytes_missing
from .verdict import OUT_OF_RANGE
from .warmup import warm_up

_MAX_SKIPPED = 10  # steps in a row without a finite loss, after which going on is pointless


class Trainer:
    """The parts of one pass over some images, from a fresh adapter; loop.py runs them.

    Args:
        model: the frozen model.
        images: the training set.
        config: the settings.
        indices: of the images to learn from.
        progress: where steps are recorded.
        steps: how many are planned.
        processes: that share its work.
    """

    def __init__(
        self,
        model: DiffusionModel,
        images: TrainingSet,
        config: TrainConfig,
        indices: Sequence[int],
        progress: Progress,
        steps: int,
        processes: Processes = ALONE,
    ) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.adapted = AdaptedModel(model, config, generator)
        self.stepper = Stepper(
            self.adapted.parameters,
            self.adapted.loss,
            self.adapted.graphs,
            config.learning_rate,
            config.weight_decay,
            config.max_norm,
            optimizer=config.optimizer,
            ema_decay=config.ema_decay,
            processes=processes,
        )
        self.stream = BatchStream(model, images, config, indices, generator, processes)
        self.memory = MemoryPlan(self.adapted, self.stepper, self.stream, progress, config.checkpointing)
        self.restarts = Restarts(config, max(1, steps // self.stream.steps_per_epoch), steps, model.device, processes)

    @contextmanager
    def ready(self, begins: OnActivity = ignore) -> Iterator[None]:
        """Put the adapter on the model, try one step, and plan the memory; the adapter stays on while this lasts.

        begins: called before each of these, as they may take long.

        Raises:
            RuntimeError: the model cannot be trained; whatever its own layers raise.
            TooLittleMemoryError: one image does not fit into the GPU's memory.
        """
        with self.adapted.injected() as join_shared_inputs:
            one_image = self.stream.trial(self.stream.indices[0])
            try:
                warm_up(self.adapted, one_image, self.config, join_shared_inputs, begins)
                self.stepper.clear_gradients()
                begins("memory")
                self.memory.make()
            except torch.cuda.OutOfMemoryError as error:
                recomputed = self.config.checkpointing != "off"
                raise TooLittleMemoryError(bytes_missing(error), self.adapted, recomputed) from error
            yield

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let others compute with the model as it would be given now.

        Captured graphs are dropped where the model's weights were moved meanwhile.
        """
        before = self.adapted.weight_addresses()
        try:
            with self.stepper.evaluation_weights():
                yield
        finally:
            if before != self.adapted.weight_addresses():
                self.adapted.graphs.clear()

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, from 0. A refit repeats that of the first pass, whatever its length."""
        config = self.config
        return learning_rate_at(step, config.steps, config.learning_rate, config.schedule, config.warm_up)

    @property
    def images_per_step(self) -> int:
        """How many images a step takes, at most."""
        return images_per_step(len(self.stream.indices), self.config.batch_size, self.config.accumulate)

    @property
    def diverged(self) -> bool:
        """Whether so many steps in a row had no finite loss that going on is pointless."""
        return self.stepper.skipped_in_a_row >= _MAX_SKIPPED

    @property
    def is_finite(self) -> bool:
        """Whether all of the adapter's weights are finite numbers."""
        return bool(torch.isfinite(self.adapted.parameters.master).all())

    def restore_last_good(self, progress: Progress) -> str:
        """Go back to the last step with a finite loss, and return a sentence for the user.

        Raises:
            FloatingPointError: there was none.
        """
        what = f"The loss has not been a finite number for {_MAX_SKIPPED} steps, up to step {progress.step}"
        if not progress.last_finite_step:
            raise FloatingPointError(f"{what}. {OUT_OF_RANGE}")
        if not self.diverged:
            what = f"The LoRA's weights are not finite after step {progress.step}"
        todo = "Lower the learning rate, or load the model in bf16 or fp32."
        self.stepper.restore_last_good()
        return f"{what}, so training ended there; what had been learned before is kept. {todo}"

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on: tensors as they are, numbers and lists."""
        return {
            "weights": self.adapted.parameters.master,
            "stepper": self.stepper.state_dict(),
            **self.stream.state_dict(),
            **self.restarts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another pass over the same images, with the same settings, was saved."""
        with torch.no_grad():
            self.adapted.parameters.master.copy_(state["weights"])
        self.adapted.parameters.refresh()
        self.stepper.load_state_dict(state["stepper"])
        self.stream.load_state_dict(state)
        self.restarts.load_state_dict(state)
