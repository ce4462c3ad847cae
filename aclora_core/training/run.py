"""What the passes of one training share: settings, callbacks, progress and facts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

import torch

from ..adapter import TrainingFacts
from ..config import TrainConfig
from ..diffusion import DiffusionModel, TrainingSet, target_variance, with_timesteps
from ..distributed import ALONE, Processes
from ..text import error_reason
from .activity import OnActivity, ignore
from .candidates import Candidates
from .checkpoint import CheckpointStore, DamagedCheckpointError
from .early_stopping import EarlyStopping
from .measurements import Measurements
from .previews import Previews
from .progress import Progress
from .requests import Requests
from .sampler import steps_per_epoch, style_indices
from .skipped_images import SkippedImages
from .trainer import Trainer

log = logging.getLogger("aclora")


@dataclass(frozen=True)
class Callbacks:
    """What a training calls while it runs."""

    on_step: Callable[[Progress], None] = lambda progress: None  # after every step
    should_stop: Callable[[], bool] = lambda: False  # after every step, and while images are measured
    previews: Previews | None = None
    candidates: Candidates | None = None
    on_activity: OnActivity = ignore  # before what takes longer than a step
    requests: Requests | None = None


class TrainingRun:
    """One training: a pass with held-out images, and a second one with all of them where that is asked for.

    `facts` grows while it runs; `progress` is that of the pass that runs; `unit` is the loss of predicting the mean
    target, by which losses are divided. It has more attributes than most classes, as it is what both passes, the loop
    and checkpoints would otherwise hand to each other one by one.
    """

    def __init__(
        self,
        model: DiffusionModel,
        images: TrainingSet,
        config: TrainConfig,
        indices: Sequence[int],
        callbacks: Callbacks,
        store: CheckpointStore | None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.images, self.config, self.indices = model, images, config, list(indices)
        self.callbacks, self.store, self.processes = callbacks, store, processes
        self.progress = Progress(config.steps, notes=list(store.notes) if store else [])
        self.skipped_images = SkippedImages(images, indices)
        self.stopped = False
        self._began = time.time()
        style = style_indices(images, indices)
        others = len(self.indices) - len(style)
        self.facts = TrainingFacts(
            images=len(style), regularisation_images=others or None, started_at=self._began, validation_seconds=0.0
        )
        objective = with_timesteps(model.objective, config.timesteps, config.timestep_shift)
        self.unit = target_variance(objective, [images.latents[index] for index in style], config.seed)
        log.info(
            "AC-LoRA: this model predicts %s; timesteps are drawn %s%s, loss weights: %s.",
            objective.prediction,
            objective.sampling,
            " (automatic)" if config.timesteps == "automatic" else "",
            config.loss_weight,
        )
        log.info("AC-LoRA: %s.", settings_text(config))
        if processes.size > 1:
            log.info("AC-LoRA: %d processes take %d of the images of a step each.", processes.size, self.rows)

    @property
    def rows(self) -> int:
        """How many images this process takes through the model at once, at most."""
        return self.config.batch_size // self.processes.size

    def asked_to_stop(self) -> bool:
        """Ask whether to stop, and remember the answer."""
        self.stopped = self.processes.any(self.callbacks.should_stop())
        if self.stopped:
            self.facts = replace(self.facts, cancelled=self.progress.stage)
        return self.stopped

    def begin_previews(self, resumed: bool) -> None:
        """Tell the files of the previews which training this is."""
        previews = self.callbacks.previews
        if previews and previews.files:
            previews.files.begin(self.facts.started_at or self._began, resumed)

    def show(self, trainer: Trainer) -> None:
        """Keep a candidate or draw previews where they are due, and call on_step."""
        previews, candidates = self.callbacks.previews, self.callbacks.candidates
        if not self.processes.is_first:
            previews = None  # it is called where the first draws
        if candidates and candidates.is_due(self.progress.step):
            self.keep_candidate(trainer, self.progress.step)
        elif previews and (problem := previews.draw_if_due(trainer, self.progress.step)):
            self.progress.note(problem)
        self.callbacks.on_step(self.progress)

    def keep_candidate(self, trainer: Trainer, step: int) -> None:
        """Draw previews and keep them with the adapter as it would be given now; a fault is no reason to end.

        step: that the weights are of; 0 before the training.
        """
        candidates, previews = self.callbacks.candidates, self.callbacks.previews
        if candidates is None or not candidates.is_missing(self.progress.stage, step):
            return
        if previews and not previews.failed:
            self.callbacks.on_activity("previews")
        if previews and (problem := previews.draw_now(trainer, step)):
            self.progress.note(problem)
        with self.sparing_candidates(candidates):
            with trainer.stepper.evaluation_weights():
                adapter = trainer.adapted.adapter(candidates.dtype)
            candidates.keep(step, adapter, self.progress)

    def helping_to_draw(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Return a context in which this process takes part whenever the first draws previews."""
        previews = self.callbacks.previews
        if previews is None or self.processes.is_first:
            return nullcontext()

        def draw(done: int) -> None:
            with suppress(Exception), trainer.lent(), torch.no_grad():  # the first tells of what goes wrong
                previews.draw(done)

        return self.processes.helping(draw)

    @contextmanager
    def sparing_candidates(self, candidates: Candidates) -> Iterator[None]:
        """Turn an exception in the block into a note; no further candidates are kept then."""
        with self.spare("Not all steps could be kept to choose from", "training goes on"):
            try:
                yield
            except Exception:
                candidates.failed = True
                raise

    def measure(self, trainer: Trainer, measurements: Measurements) -> None:
        """Measure images with the adapter as it would be given now."""
        with self._measuring(), trainer.stepper.evaluation_weights():
            self._measure_as_it_is(trainer, measurements, self.progress.step)
        if isinstance(measurements, EarlyStopping):
            self.expect_refit(measurements)

    def measure_model(self, trainer: Trainer, measurements: Measurements) -> None:
        """Measure images without the adapter, where that was not done before the first step."""
        with self._measuring(), trainer.adapted.parameters.switched_off():
            self._measure_as_it_is(trainer, measurements, 0)

    def _measure_as_it_is(self, trainer: Trainer, measurements: Measurements, step: int) -> None:
        """Measure with the weights that the model has now, so many images at a time as fit."""

        def measure() -> None:
            measurements.images.limit(trainer.stream.rows)
            measurements.measure(step, self.callbacks.should_stop)

        trainer.memory.retried(measure)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Count the time of the block."""
        self.callbacks.on_activity("measuring")
        began = time.monotonic()
        yield
        seconds = (self.facts.validation_seconds or 0.0) + time.monotonic() - began
        self.facts = replace(self.facts, validation_seconds=seconds)

    def expect_refit(self, early_stopping: EarlyStopping | None) -> None:
        """Estimate the length of the refit: the best step so far, or all steps while the loss still improves."""
        if early_stopping and self.config.refit:
            best, measured = early_stopping.best_step, early_stopping.history
            self.progress.remaining = best if measured and best < measured[-1][0] else self.config.steps

    def end_diverged(self, trainer: Trainer, measurements: Measurements | None) -> None:
        """End a pass whose loss or adapter is not finite any more, with the weights of its last good step."""
        sentence = trainer.restore_last_good(self.progress)
        log.warning("AC-LoRA: %s", sentence)
        self.progress.note(sentence)
        if measurements:
            self._measure_last_good(trainer, measurements)
        self.stopped = True

    def _measure_last_good(self, trainer: Trainer, measurements: Measurements) -> None:
        """Measure the adapter of the last good step, so that it is known whether it is better than none."""
        step, history = self.progress.last_finite_step, measurements.history
        if isinstance(measurements, EarlyStopping):
            if history and history[-1][0] >= step:  # the best step before it is given
                return
        else:
            history[:] = [measured for measured in history if measured[0] < step]
        with self._measuring(), trainer.stepper.evaluation_weights():
            self._measure_as_it_is(trainer, measurements, step)

    @contextmanager
    def spare(self, what: str, kept: str) -> Iterator[None]:
        """Turn any exception in the block into a warning and a note, so that finished work is still returned."""
        try:
            yield
        except DamagedCheckpointError:  # another checkpoint may be whole
            raise
        except Exception as error:  # whatever a model, a driver or a callback raises
            log.warning("AC-LoRA: %s; %s.", what, kept, exc_info=True)
            self.progress.note(f"{what} ({error_reason(error)}); {kept}.")

    def final_facts(self, held_out: int, trained_on: int) -> TrainingFacts:
        """Return the facts at the end.

        Args:
            held_out: number of held-out images.
            trained_on: number of images that the adapter learned from.
        """
        facts, previews = self.facts, self.callbacks.previews
        if sentence := self.skipped_images.sentence:
            self.progress.note(sentence)
        per_epoch = steps_per_epoch(trained_on, self.config.batch_size, self.config.accumulate)
        return replace(
            facts,
            held_out_images=held_out,
            steps_run=self.progress.done,
            validation_seconds=round(facts.validation_seconds or 0.0, 2),
            preview_seconds=round(previews.seconds, 2) if previews else None,
            previews_left_out=previews.left_out if previews else None,
            checkpoint_seconds=round(facts.checkpoint_seconds or 0.0, 2) if self.store else None,
            notes=" ".join(self.progress.notes),
            epochs=math.ceil(self.progress.step / per_epoch),
            finished_at=time.time(),
            seconds_run=round(time.time() - self._began, 2),
        )


def settings_text(config: TrainConfig) -> str:
    """Return the main settings in one line for the log."""
    accumulated = f" × {config.accumulate}" if config.accumulate > 1 else ""
    return (
        f"up to {config.steps} steps of {config.batch_size} images{accumulated}; {config.optimizer}, "
        f"learning rate {config.learning_rate:g} ({config.schedule}); rank {config.max_rank} at most, "
        f"alpha {config.alpha:g}, on {config.layers}"
    )
