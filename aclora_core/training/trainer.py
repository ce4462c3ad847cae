"""One pass of training from a fresh adapter: batches, steps, and restarts that find out which components are signal."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..acceleration import (
    ActivationCheckpointing,
    CudaGraphRunner,
    InplaceAddLog,
    NoInplaceAdd,
    compile_in_parallel,
    find_kernels,
    fuse_modules,
)
from ..adapter import Adapter, Restart
from ..config import TrainConfig, rank_overrides
from ..diffusion import Batch, Model, denoising_losses
from ..lora import alpha_scales, injected, make_parameters, target_layers
from ..method import LayerRestart, Mode, dynamic_threshold, is_restart_epoch, restart_adapter
from ..optim import Stepper, learning_rate_at
from ..storage import component_tensors, map_tensors
from .batches import BatchStream, StepBatches
from .memory import MemoryPlan

if TYPE_CHECKING:
    from .progress import Progress


# Networks for which kernels were compiled since the program was started; what a setting adds is compiled when it runs.
_compiled_for: set[Hashable] = set()


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
        self.layers = target_layers(model, config)
        self.weights = make_parameters(
            self.layers,
            config.max_rank,
            config.alpha,
            self.generator,
            model.device,
            model.dtype,
            rank_overrides(self.layers, config.layer_ranks, model.prefix),
            alpha_scales(self.layers, model, config),
        )
        self.graphs = CudaGraphRunner(model.device, config.graph)
        self.memory = ActivationCheckpointing(model.network)
        self.stepper = Stepper(
            self.weights,
            self._loss,
            self.graphs,
            config.learning_rate,
            config.weight_decay,
            config.max_norm,
            optimizer=config.optimizer,
            ema_decay=config.ema_decay,
        )
        self._drawing = BatchStream(model, config, pictures, self.generator)
        self.fitting = MemoryPlan(model, self.memory, self.stepper, self._drawing, progress)
        self._upcoming: StepBatches | None = None  # drawn ahead, while the GPU was busy
        self._before_upcoming: dict[str, Any] = {}  # where a checkpoint has to go on
        self.total_epochs = max(1, steps // self._drawing.per_epoch)
        self._restarted_at = 0
        self._silent: list[int] = []  # steps since the last restart whose loss tells nothing of the style

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Puts the adapter on the model for as long as the context lasts."""
        model = self.model
        quick = fuse_modules(model.network, model.is_unpatched, model.fusable)
        adapter = injected(self.layers, self.weights.layers, model.is_unpatched)
        with quick, adapter as join_siblings, self.memory.attached():
            self._try(join_siblings)
            if self.config.checkpointing == "automatic" and self._on_gpu:
                self.fitting.plan(self._pictures, self._loss)
            try:
                yield
            finally:
                self.graphs.clear()  # they hold the memory of a whole step

    def adapter(self) -> Adapter:
        """The adapter as it is, in main memory."""
        return Adapter({name: branch.layer() for name, branch in self.weights.layers.items()})

    def step(self) -> None:
        """Takes the next batch, and restarts the adapter where an interval ends."""
        batches, epoch, ends_epoch, tells = self._upcoming or self._drawing.next_step()
        self._upcoming = None
        losses = self.progress.losses
        if not tells:
            self._silent.append(len(losses))
        self.stepper.learning_rate = self._rate(len(losses))
        due = self.config.mode != "off" and is_restart_epoch(epoch, self.config.restart_every, self.total_epochs)
        restarts = ends_epoch and due
        losses.append(self._fitting_step(batches, restarts) / self.unit)
        self.progress.learning_rate = self.stepper.learning_rate
        if restarts:
            self._restart_if_known(epoch)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For others to compute with the model as it is. Graphs are recorded anew where its weights were moved."""
        before = self._addresses()
        try:
            with self.stepper.shown():
                yield
        finally:
            if before != self._addresses():
                self.graphs.clear()

    def _addresses(self) -> list[int]:
        weights = self.model.network.parameters()
        return [part.data_ptr() for tensor in weights for part in component_tensors(tensor)]

    @property
    def diverged(self) -> bool:
        """Whether so many steps in a row had no finite loss that going on is pointless."""
        return self.stepper.skipped_in_a_row >= _MOST_SKIPPED

    def take_back(self) -> str:
        """Goes back to the last step with a finite loss, and says so.

        Raises:
            FloatingPointError: there was none.
        """
        steps = len(self.progress.losses)
        what = f"The loss has not been a finite number for {_MOST_SKIPPED} steps, up to step {steps}"
        todo = "Lower the learning rate, or load the model in bf16 or fp32."
        if not self.progress.last_finite_step:
            raise FloatingPointError(f"{what}. {todo}")
        self.stepper.restore_last_good()
        return f"{what}, so training ended there; what had been learned before is kept. {todo}"

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors as they are, numbers and lists."""
        return {
            "weights": self.weights.master,
            "stepper": self.stepper.state_dict(),
            **(self._before_upcoming if self._upcoming else self._position()),
            "noises": self.noises.get_state(),
            "restarted_at": self._restarted_at,
            "silent": self._silent,
        }

    def _position(self) -> dict[str, Any]:
        """What the batches that are still to be drawn depend on."""
        return {"order": self._drawing.state_dict(), "generator": self.generator.get_state()}

    def _draw_ahead(self) -> Sequence[Batch]:
        """Draws the next step, for a GPU into memory from which it is copied without waiting, and gives its batches.

        Text encoders that learn are asked when this step is over: what they give follows from it.
        """
        if self._upcoming is not None or self.model.text_encoders:
            return ()
        self._before_upcoming = self._position()
        self._upcoming = self._drawing.next_step()
        if self._on_gpu:
            batches = map_tensors(self._upcoming.batches, lambda it: it if it.is_cuda else it.pin_memory())
            self._upcoming = self._upcoming._replace(batches=batches)
        return self._upcoming.batches

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another pass over the same pictures, with the same settings, stood."""
        with torch.no_grad():
            self.weights.master.copy_(state["weights"])
        self.weights.refresh()
        self.stepper.load_state_dict(state["stepper"])
        self._upcoming = None
        self._drawing.load_state_dict(state["order"])
        self.generator.set_state(state["generator"])
        self.noises.set_state(state["noises"])
        self._restarted_at = state["restarted_at"]
        self._silent = list(state.get("silent", []))

    def _rate(self, step: int) -> float:
        """The learning rate of a step. The second pass has that of the first: it is to repeat what was best in it."""
        config = self.config
        return learning_rate_at(step, config.steps, config.learning_rate, config.schedule, config.warm_up)

    def _fitting_step(self, batches: Sequence[Batch], restarts: bool) -> float:
        """One step. restarts: whether the adapter restarts after it; nothing of the next can be begun before that."""

        def meanwhile() -> Sequence[Batch]:
            upcoming = self._draw_ahead()
            return () if restarts else upcoming

        return self.fitting.step(batches, meanwhile, self.config.checkpointing == "automatic")

    def _try(self, join_siblings: Callable[[], None]) -> None:
        """One way there and back with one picture, so that a model that cannot be trained fails before the work.

        join_siblings: to be called when layers were seen that read the same tensor.
        """
        batch = self._drawing.trial(self._pictures[0])
        if self.config.checkpointing == "all" or (self.config.checkpointing == "automatic" and self._on_gpu):
            self.memory.recompute_all()
        kernels = find_kernels(self.model.device, self.model.dtype, "lora")
        kind = type(self.model.network), self.model.dtype, self.model.device, self.config.max_rank, self.config.layers
        if kernels is not None and kind not in _compiled_for:
            with compile_in_parallel(self.model.device, kernels):
                for _ in range(2):  # layers alone, and joined
                    self._there_and_back(batch)
                    join_siblings()
            _compiled_for.add(kind)
        self._there_and_back(batch)
        join_siblings()
        self.stepper.clear_gradients()
        if self.config.checkpointing == "automatic":
            self.memory.recomputed.clear()

    def _there_and_back(self, batch: Batch) -> None:
        if not self._works(batch):
            # Most likely the network overwrites what its backward pass needs; that shows in many ways.
            self.memory.no_inplace_add = True
            self._loss(batch)[0].backward()

    def _works(self, batch: Batch) -> bool:
        """Whether the network gives gradients. Kept, its error would keep the hooks of checkpoints alive."""
        overwritten = InplaceAddLog()
        try:
            with overwritten:
                self._loss(batch)[0].backward()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            overwritten.detach_all()
            return False
        return True

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What a batch adds to what its step makes smaller, and to the loss that is told, which AC-LoRA Eq. 5 takes."""
        with NoInplaceAdd() if self.memory.no_inplace_add else nullcontext():
            losses = denoising_losses(self.model, batch)
            weighed = losses * batch.weight
            told = weighed.sum()
            learned = weighed if batch.learned is None else losses * batch.learned
            if batch.loss_weight is not None:
                learned = learned * batch.loss_weight
            return (told if learned is weighed else learned.sum()), told

    def _restart_if_known(self, epoch: int) -> None:
        """Restarts, if there was a finite loss since the last time: else nothing tells how much is signal."""
        losses = self.progress.losses
        steps = range(self._restarted_at, len(losses))
        since = [losses[step] for step in steps if math.isfinite(losses[step]) and step not in self._silent]
        if since:
            self.progress.restarts.append(self._restart(epoch, sum(since) / len(since)))
            self._restarted_at, self._silent = len(losses), []

    def _restart(self, epoch: int, loss: float) -> Restart:
        """Splits every layer into signal and noise and draws the noise afresh (AC-LoRA Eq. 2, 3, 5, 6)."""
        threshold = self._threshold(epoch, loss)
        branches = self.weights.layers
        parts = {name: (branch.lora_down, branch.lora_up, branch.scale) for name, branch in branches.items()}
        mode: Mode = self.config.mode  # type: ignore[assignment]
        results = restart_adapter(parts, threshold, self.noises, mode, self.config.measure)
        self.weights.refresh()
        if self.config.clear_moments:
            self.stepper.forget(_redrawn(parts, results))
        touched = [name for name, result in results.items() if result.redrawn_down or result.redrawn_up]
        self.stepper.restart_average(factor for name in touched for factor in parts[name][:2])
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
