"""The training of an adapter: batches, steps, restarts, and the choice of the step and the size that are best."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..adapter import Adapter, Setting, TruncationLoss
from ..config import CheckpointConfig, TrainConfig
from ..diffusion import Model, Objective, target_variance, with_timesteps
from ..optim import check_installed
from ..text import error_reason
from .checkpoint import CheckpointStore
from .compression import WHOLE, TruncationRule, smallest_truncation
from .fingerprint import training_fingerprint
from .previews import Previews
from .progress import FirstPass, Progress, Result
from .report import make_report
from .sampler import steps_per_epoch, style_indices
from .trainer import TrainingPass
from .validation import FEWEST_PICTURES, EarlyStopping, ValidationSet, hold_out

log = logging.getLogger("aclora")


def train(
    model: Model,
    config: TrainConfig,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    pictures: Sequence[int] | None = None,
    checkpoints: CheckpointConfig | None = None,
    previews: Previews | None = None,
) -> Result:
    """Trains a LoRA with restarts (AC-LoRA) and gives it with its report.

    With eight pictures or more some are held out: by their loss the best step is kept, the training stopped, and the
    adapter cut to the smallest that is as good. After every step on_step is called and should_stop is asked, the latter
    while pictures are measured as well; a training that is stopped gives what it has.
    pictures: those to learn from, by number; None for all.
    The same seed gives the same adapter on the same device, also when the training was ended by force in between and
    goes on from one of its checkpoints.

    Raises:
        ValueError: a setting does not fit the model, the pictures or the checkpoint; nothing has been trained then.
        ModuleNotFoundError: the optimizer's library is not installed.
        FloatingPointError: the loss was not finite for ten steps in a row, and never before.
    """
    pictures = list((model.variants or range(len(model.latents))) if pictures is None else pictures)
    if not style_indices(model, pictures):
        raise ValueError("There are no pictures to learn from.")
    check_installed(config.optimizer)
    store = CheckpointStore(checkpoints, training_fingerprint(model, config, pictures)) if checkpoints else None
    return _Training(model, config, pictures, on_step, should_stop, store, previews).run()


class _Training:
    """One call of train: a pass with held-out pictures, and where wished a second one with all."""

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        pictures: list[int],
        on_step: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        store: CheckpointStore | None,
        previews: Previews | None,
    ) -> None:
        self.model, self.config, self.pictures = model, config, pictures
        self.store, self.previews = store, previews
        self.on_step, self.should_stop = on_step, should_stop
        self.progress = Progress(config.steps)
        style = style_indices(model, pictures)
        self.facts: dict[str, Setting] = {"images": len(style), "started_at": time.time()}
        if len(style) < len(pictures):
            self.facts["regularisation_images"] = len(pictures) - len(style)
        chosen = with_timesteps(model.objective, config.timesteps)
        self.unit = target_variance(chosen, [model.latents[n] for n in style], config.seed)
        self._log_settings(chosen)
        self.stopped, self.began = False, time.time()
        self.measuring_seconds = self.writing_seconds = 0.0

    def _log_settings(self, chosen: Objective) -> None:
        config = self.config
        log.info(
            "AC-LoRA: this model predicts %s; timesteps are drawn %s%s, loss weights: %s.",
            chosen.prediction,
            chosen.sampling,
            " (automatic)" if config.timesteps == "automatic" else "",
            config.loss_weight,
        )
        log.info(
            "AC-LoRA: up to %d steps of %d pictures%s; %s, learning rate %g (%s); rank %d at most, alpha %g, on %s.",
            config.steps,
            config.batch_size,
            f" × {config.accumulate}" if config.accumulate > 1 else "",
            config.optimizer,
            config.learning_rate,
            config.schedule,
            config.max_rank,
            config.alpha,
            config.layers,
        )

    def run(self) -> Result:
        learned, held = hold_out(self.model, self.pictures, self.config.held_out, self.config.seed)
        if self.config.held_out and not held:
            log.info(
                "AC-LoRA: with fewer than %d different pictures none is held out. The adapter of the last step is "
                "given, whole; judge the number of steps by pictures drawn with it.",
                FEWEST_PICTURES,
            )
        state = self.store.find() if self.store else None
        if state is not None:
            self.facts, self.measuring_seconds = dict(state["facts"]), state["measuring_seconds"]
            self.facts.pop("cancelled", None)
        found = self._found(state, learned, held)
        second = None
        if held and self.config.refit and not self.stopped:
            second = self._second_pass(found, state if state and "found" in state else None)
        adapter, seen = (found.adapter, learned) if second is None else (second, self.pictures)
        self.facts |= {"held_out_images": len(held), "steps_run": self.progress.done}
        self.facts["validation_seconds"] = round(self.measuring_seconds, 2)
        if self.previews:
            self.facts["preview_seconds"] = round(self.previews.seconds, 2)
            self.facts["previews_left_out"] = self.previews.left_out
        if self.store:
            self.facts["checkpoint_seconds"] = round(self.writing_seconds, 2)
        if self.progress.notes:
            self.facts["notes"] = " ".join(self.progress.notes)
        per_epoch = steps_per_epoch(len(seen), self.config.batch_size, self.config.accumulate)
        self.facts["epochs"] = math.ceil(len(self.progress.losses) / per_epoch)
        self.facts |= {"finished_at": time.time(), "seconds_run": round(time.time() - self.began, 2)}
        return Result(adapter, make_report(self.config, self.facts, self.progress, adapter, found.cuts))

    def _found(self, state: Mapping[str, Any] | None, learned: list[int], held: list[int]) -> FirstPass:
        """What the first pass finds, or what a checkpoint of the second knows of it."""
        if state and "found" in state:
            self.progress.load_state_dict(state["first_progress"])
            return FirstPass.from_state_dict(state["found"])
        return self._first_pass(learned, held, state)

    def _first_pass(self, learned: list[int], held: list[int], state: Mapping[str, Any] | None) -> FirstPass:
        work = TrainingPass(self.model, self.config, learned, self.unit, self.progress, self.config.steps)
        with work.attached():
            validation = None
            if held:
                settings = self.config.seed, self.config.batch_size, work.graphs, self.config.mask_floor
                held_out = ValidationSet(self.model, held, *settings)
                per_step = self.config.batch_size * self.config.accumulate
                validation = EarlyStopping(held_out, work.weights, per_step, self.unit)
                self.progress.validation = validation.history
            if state is not None:
                self._go_on(state, work, validation)
            self._look_ahead(validation)
            self._run(work, self.config.steps, validation)
            if validation is None:
                return FirstPass(work.adapter(), WHOLE, [], self.progress.last_finite_step)
            self.facts["best_step"] = best = validation.restore_best(self.progress.last_finite_step)
            adapter, cut, cuts = work.adapter(), WHOLE, list[TruncationLoss]()
            if self.config.smallest and not self.stopped:
                self.progress.stage = "cutting"
                with self._spared("The adapter could not be cut to its smallest size", "it is given whole"):
                    cut, cuts = self._cut(adapter, work, validation)
            return FirstPass(cut.apply(adapter), cut, cuts, best)

    @contextmanager
    def _spared(self, what: str, kept: str) -> Iterator[None]:
        """What fails in here costs no work that is done already. What the user is told is what failed, and why."""
        try:
            yield
        except Exception as error:  # whatever a model, a driver or a callback raises
            log.warning("AC-LoRA: %s; %s.", what, kept, exc_info=True)
            self.progress.note(f"{what} ({error_reason(error)}); {kept}.")

    def _second_pass(self, found: FirstPass, state: Mapping[str, Any] | None) -> Adapter | None:
        """Trains on all pictures up to the step that was best without the held-out ones, and cuts in the same way.

        None when it does not come to its end: the adapter of the first pass is better than half of this one.
        """
        steps, before = found.steps, self.progress
        log.info("AC-LoRA: step %d was best; training up to it again, on all %d pictures.", steps, len(self.pictures))
        self.progress = Progress(
            before.done + steps,
            before.done,
            stage="training on all",
            validation=before.validation,
            resumed_at=before.resumed_at,
            notes=before.notes,
        )
        with self._spared("Training on all pictures failed", "what was found before it is given"):
            work = TrainingPass(self.model, self.config, self.pictures, self.unit, self.progress, steps)
            with work.attached():
                if state is not None:
                    self._go_on(state, work, None)
                self._run(work, steps, None, {"found": found.state_dict(), "first_progress": before.state_dict()})
                if not self.stopped:
                    return found.cut.apply(work.adapter())
        before.done = self.progress.done
        self.progress = before
        return None

    def _run(
        self, work: TrainingPass, steps: int, validation: EarlyStopping | None, known: Mapping[str, Any] | None = None
    ) -> None:
        """Steps until the pass has its steps, the best is passed, or somebody stops it. known: for its checkpoints."""
        if validation and validation.owes(len(self.progress.losses), steps):
            self._measure(work, validation, len(self.progress.losses))
        while (step := len(self.progress.losses)) < steps:
            if validation and self.config.stop_early and validation.passed():
                log.info("AC-LoRA: stopped at step %d, as step %d was better.", step, validation.best_step)
                break
            if self._step(work, validation, steps):
                break
            if self.store and (step + 1) % self.store.settings.every == 0:
                self._save(work, validation, known)
        if not work.diverged:
            self._save(work, validation, known)
        work.stepper.finish()

    def _step(self, work: TrainingPass, validation: EarlyStopping | None, steps: int) -> bool:
        """One step, and whether it was the last."""
        work.step()
        self.progress.done += 1
        step = len(self.progress.losses)
        if not math.isfinite(self.progress.losses[-1]) and self.progress.skipped_steps == 1:
            log.warning("AC-LoRA: step %d was left out, as its loss was not finite; such steps are counted.", step)
        if work.diverged:
            sentence = work.take_back()
            log.warning("AC-LoRA: %s", sentence)
            self.progress.note(sentence)
            self.stopped = True
            return True
        if validation and validation.due(step, steps):
            self._measure(work, validation, step)
        if self.previews and (problem := self.previews.run(work, self.progress.done)):
            self.progress.note(problem)
        self.on_step(self.progress)
        if self._asked_to_stop():
            log.info("AC-LoRA: stopped at step %d of %d; what was learned so far is kept.", step, steps)
        return self.stopped

    def _asked_to_stop(self) -> bool:
        self.stopped = self.should_stop()
        if self.stopped:
            self.facts["cancelled"] = self.progress.stage
        return self.stopped

    def _go_on(self, state: Mapping[str, Any], work: TrainingPass, validation: EarlyStopping | None) -> None:
        """Takes over the state of a checkpoint.

        Raises:
            ValueError: more steps are wished of a training that would stop at once.
        """
        work.load_state_dict(state["work"])
        total = self.progress.total
        self.progress.load_state_dict(state["progress"])
        self.progress.total = total
        if validation:
            validation.load_state_dict(state["validation"])
            self.progress.validation = validation.history
        step = len(self.progress.losses)
        wants_more = state["planned"] < self.config.steps
        if wants_more and validation and self.config.stop_early and validation.passed():
            raise ValueError(
                f"This training had stopped by itself at step {step}, as step {validation.best_step} was better, and "
                "would stop again at once. Switch stop_early off to go on all the same."
            )
        log.info("AC-LoRA: resumed at step %d of %d.", self.progress.done, self.progress.total)

    def _save(self, work: TrainingPass, validation: EarlyStopping | None, known: Mapping[str, Any] | None) -> None:
        """Writes a checkpoint, where they are on; one that cannot be written is no reason to end."""
        stage, step = "refit" if known else "first", len(self.progress.losses)
        if self.store is None or self.store.has(stage, step):
            return
        began = time.monotonic()
        state = {
            "work": work.state_dict(),
            "progress": self.progress.state_dict(),
            "facts": self.facts,
            "measuring_seconds": self.measuring_seconds,
            "planned": self.config.steps,
            **(known or {}),
        }
        if validation:
            state["validation"] = validation.state_dict()
        problem = self.store.write(stage, step, state)
        if problem:
            self.progress.note(problem)
        self.writing_seconds += time.monotonic() - began

    def _measure(self, work: TrainingPass, validation: EarlyStopping, step: int) -> None:
        began = time.monotonic()
        with work.stepper.shown():
            validation.measure(step, self.should_stop)
        self._look_ahead(validation)
        self.measuring_seconds += time.monotonic() - began

    def _look_ahead(self, validation: EarlyStopping | None) -> None:
        """How long the second pass will be: up to the best step, which may still come if the last one was the best."""
        if validation and self.config.refit:
            best, measured = validation.best_step, validation.history
            self.progress.remaining = best if measured and best < measured[-1][0] else self.config.steps

    def _cut(
        self, adapter: Adapter, work: TrainingPass, validation: EarlyStopping
    ) -> tuple[TruncationRule, list[TruncationLoss]]:
        def losses_of(candidate: Adapter) -> Tensor:
            work.weights.load(candidate.layers)
            return validation.held_out.losses() / self.unit

        def asked_to_stop() -> bool:
            self.on_step(self.progress)
            return self._asked_to_stop()

        return smallest_truncation(adapter, losses_of, asked_to_stop)
