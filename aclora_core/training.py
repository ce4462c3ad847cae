"""The training of an adapter: batches, steps, restarts, and the choice of the step and the size that are best."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from . import batches, lora, objective
from .adapter_file import Adapter
from .config import TrainConfig
from .cutting import Rule, rank_rule
from .model import Model
from .report import CutLoss, RankReport, Restart, Setting
from .smallest import WHOLE, Cut, smallest_cut
from .spectrum import delta_singular_values
from .training_pass import TrainingPass
from .validation import FEWEST_PICTURES, HeldOut, Validation, split

log = logging.getLogger("aclora")


@dataclass
class Progress:
    """Where a training stands; what a callback may look at."""

    total: int  # steps, as far as known
    done: int = 0  # steps, of all passes
    stage: str = "training"
    losses: list[float] = field(default_factory=list)  # of every step of this pass, relative to the mean target
    restarts: list[Restart] = field(default_factory=list)  # of this pass
    validation: list[tuple[int, float]] = field(default_factory=list)  # step and held-out loss


@dataclass(frozen=True, eq=False)
class Result:
    """What a training gives, also one that was stopped early."""

    adapter: Adapter
    report: RankReport


def train(
    model: Model,
    config: TrainConfig,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    pictures: Sequence[int] | None = None,
) -> Result:
    """Trains a LoRA with restarts (AC-LoRA) and gives it with its report.

    With eight pictures or more some are held out: by their loss the best step is kept, the training stopped, and the
    adapter cut to the smallest that is as good. After every step on_step is called and should_stop is asked; a
    training that is stopped gives what it has. pictures: those to learn from, by number; None for all.
    The same seed gives the same adapter on the same device.

    Raises:
        ValueError: a setting does not fit the model or the pictures; nothing has been trained then.
        FloatingPointError: the loss was not finite for ten steps in a row.
    """
    pictures = list(range(len(model.latents)) if pictures is None else pictures)
    if not pictures:
        raise ValueError("There are no pictures to learn from.")
    if not lora.find_layers(model.network, config.layers, model.prefix):
        raise ValueError("This model has no linear layer that a LoRA could be trained on.")
    return _Training(model, config, pictures, on_step, should_stop).run()


class _Training:
    """One call of train: a pass with held-out pictures, and where wished a second one with all."""

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        pictures: list[int],
        on_step: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.model, self.config, self.pictures = model, config, pictures
        self.on_step, self.should_stop = on_step, should_stop
        self.progress = Progress(config.steps)
        self.facts: dict[str, Setting] = {"images": len(pictures), "optimizer": "AdamW", "started_at": time.time()}
        self.unit = objective.target_variance(model.objective, [model.latents[n] for n in pictures], config.seed)
        self.stopped = False
        self.measuring_seconds = 0.0

    def run(self) -> Result:
        learned, held = split(self.model, self.pictures, self.config.held_out, self.config.seed)
        if self.config.held_out and not held:
            log.info(
                "AC-LoRA: with fewer than %d different pictures none is held out. The adapter of the last step is "
                "given, whole; judge the number of steps by pictures drawn with it.",
                FEWEST_PICTURES,
            )
        adapter, cut, cuts, steps = self._first_pass(learned, held)
        if held and self.config.refit and not self.stopped:
            adapter = cut.apply(self._second_pass(steps))
        self.facts |= {"held_out_images": len(held), "steps_run": self.progress.done}
        self.facts["validation_seconds"] = round(self.measuring_seconds, 2)
        return Result(adapter, self._report(adapter, cuts))

    def _first_pass(self, learned: list[int], held: list[int]) -> tuple[Adapter, Cut, list[CutLoss], int]:
        """The adapter of the best step, cut; how it was cut, what other cuts lose, and which step it was."""
        work = TrainingPass(self.model, self.config, learned, self.unit, self.progress, self.config.steps)
        with work.attached():
            if not held:
                self._run(work, self.config.steps, None)
                return work.adapter(), WHOLE, [], len(self.progress.losses)
            held_out = HeldOut(self.model, held, self.config.seed, self.config.batch_size, work.graphs)
            validation = Validation(held_out, work.weights, self.config.batch_size, self.unit)
            self.progress.validation = validation.history
            self._run(work, self.config.steps, validation)
            validation.restore_best()
            self.facts["best_step"] = best = validation.best_step or len(self.progress.losses)
            adapter, cut, cuts = work.adapter(), WHOLE, list[CutLoss]()
            if self.config.smallest and not self.stopped:
                self.progress.stage = "cutting"
                cut, cuts = self._cut(adapter, work, validation)
            return cut.apply(adapter), cut, cuts, best

    def _second_pass(self, steps: int) -> Adapter:
        """Trains on all pictures up to the step that was best without the held-out ones."""
        log.info("AC-LoRA: step %d was best; training up to it again, on all %d pictures.", steps, len(self.pictures))
        before = self.progress
        self.progress = Progress(before.done + steps, before.done, "training on all", validation=before.validation)
        work = TrainingPass(self.model, self.config, self.pictures, self.unit, self.progress, steps)
        with work.attached():
            self._run(work, steps, None)
            return work.adapter()

    def _run(self, work: TrainingPass, steps: int, validation: Validation | None) -> None:
        if validation:
            self._measure(validation, 0)
        for step in range(1, steps + 1):
            work.step()
            self.progress.done += 1
            if validation and validation.due(step, steps):
                self._measure(validation, step)
            self.on_step(self.progress)
            if self.should_stop():
                self.stopped = True
                log.info("AC-LoRA: stopped at step %d of %d; what was learned so far is kept.", step, steps)
                return
            if validation and self.config.stop_early and validation.passed():
                log.info("AC-LoRA: stopped at step %d, as step %d was better.", step, validation.best_step)
                return

    def _measure(self, validation: Validation, step: int) -> None:
        began = time.monotonic()
        validation.measure(step)
        self.measuring_seconds += time.monotonic() - began

    def _cut(self, adapter: Adapter, work: TrainingPass, validation: Validation) -> tuple[Cut, list[CutLoss]]:
        def losses_of(candidate: Adapter) -> Tensor:
            work.weights.load(candidate.layers)
            return validation.held_out.losses() / self.unit

        def asked_to_stop() -> bool:
            self.on_step(self.progress)
            self.stopped = self.should_stop()
            return self.stopped

        return smallest_cut(adapter, losses_of, asked_to_stop)

    def _report(self, adapter: Adapter, cuts: list[CutLoss]) -> RankReport:
        """The trajectory, and the spectrum of what came out."""
        progress = self.progress
        layers = adapter.layers.items()
        spectrum = {name: delta_singular_values(*layer.factors(), layer.scale).tolist() for name, layer in layers}
        rule = _signal_rule(self.config, progress.restarts)
        signal = {name: rule(torch.tensor(values)) for name, values in spectrum.items()}
        per_epoch = batches.steps_per_epoch(self.pictures, self.model.groups, self.config.batch_size)
        self.facts |= {"epochs": math.ceil(len(progress.losses) / per_epoch), "finished_at": time.time()}
        settings = {**asdict(self.config), **self.facts}
        return RankReport(
            settings, list(progress.losses), list(progress.validation), list(progress.restarts), spectrum, signal, cuts
        )


def _signal_rule(config: TrainConfig, restarts: Sequence[Restart]) -> Rule:
    """Signal is as many components as reach the last threshold, or 95 % of the energy.

    Eq. 3 would count one fewer, and an adapter that was cut to it would lose that one.
    """
    if restarts and math.isnan(restarts[-1].threshold):
        return rank_rule("noise_floor")
    threshold = max(restarts[-1].threshold, 1e-6) if restarts else 0.95
    return rank_rule("sum" if restarts and config.measure == "sum" else "energy", threshold)
