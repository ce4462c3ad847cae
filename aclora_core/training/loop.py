"""The training loop of one pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

from ..diffusion import Batch
from ..text import count_noun
from .answers import answer_requests
from .batches import BatchStream
from .first_pass import FirstPass
from .measurements import Measurements
from .resume import save_checkpoint
from .run import TrainingRun
from .trainer import Trainer
from .verdict import OUT_OF_RANGE

log = logging.getLogger("aclora")


def run_pass(
    run: TrainingRun,
    trainer: Trainer,
    steps: int,
    measurements: Measurements | None = None,
    first: FirstPass | None = None,
) -> None:
    """Train until the pass has its steps, the best one is passed, the loss diverges, or somebody stops it.

    Args:
        run: what the passes of a training share.
        trainer: the parts of this pass, ready.
        steps: how many the pass has at most.
        measurements: of held-out or training images; None in a refit.
        first: what the first pass found, where this is the second; checkpoints keep it.

    Raises:
        FloatingPointError: no step had a finite loss, so nothing was learned.
    """
    progress, stepper, restarts = run.progress, trainer.stepper, trainer.restarts
    if measurements and measurements.is_overdue(progress.step, steps):
        run.measure(trainer, measurements)
    if first is None and progress.step == 0:
        run.keep_candidate(trainer, 0)
    run.callbacks.on_activity("first step")
    while progress.step < steps:
        if measurements and run.config.stop_early and measurements.ends_training():
            log.info("AC-LoRA: stopped at step %d: %s.", progress.step, measurements.reason)
            break

        # One step: the loss and the gradient of its micro-batches, then the optimizer.
        step = trainer.memory.retried(trainer.stream.next_step)
        restart_due = restarts.is_due(step, progress.step + 1)
        if not step.reports_style:
            restarts.leave_out(progress.step)
        stepper.learning_rate = trainer.learning_rate_at(progress.step)
        prefetch = partial(_prefetch, trainer.stream, begin=not restart_due)
        for batches in trainer.memory.attempts(step.batches):
            with trainer.memory.out_of_memory_caught(max((len(batch.sigma) for batch in batches), default=0)):
                loss = stepper.step(batches, prefetch)
        trainer.memory.step_ended()
        progress.record(loss / run.unit, stepper.learning_rate)
        run.skipped_images.record(step.indices, counted=math.isfinite(loss))

        # AC-LoRA: keep the signal of each layer and redraw its noise.
        if restart_due:
            restart = restarts.apply(trainer.adapted.parameters, stepper, step.epoch, progress.losses)
            progress.restarts += [restart] if restart else []
            if measurements:
                measurements.last_restart = progress.step

        if trainer.diverged:
            run.end_diverged(trainer, measurements)
            break
        if not math.isfinite(progress.losses[-1]) and progress.skipped_steps == 1:
            log.warning("AC-LoRA: step %d was skipped, as its loss was not finite; such steps count.", progress.step)
        if measurements and measurements.is_due(progress.step, steps):
            run.measure(trainer, measurements)
        answer_requests(run, trainer)
        run.show(trainer)
        if run.asked_to_stop():
            log.info("AC-LoRA: stopped at step %d of %d; what was learned so far is kept.", progress.step, steps)
            break
        if run.store and progress.step % run.store.settings.every == 0:
            save_checkpoint(run, trainer, measurements, first)
    _end_pass(run, trainer, measurements, first)


def _end_pass(run: TrainingRun, trainer: Trainer, measurements: Measurements | None, first: FirstPass | None) -> None:
    """Save the end of a pass and keep it to choose from, with the weights of its last good step. Raises as run_pass."""
    progress = run.progress
    if progress.step and not progress.last_finite_step and not run.stopped:
        steps_taken = count_noun(progress.step, "step")
        what = f"Nothing was learned: in {steps_taken} the loss or its gradient was never a finite number"
        raise FloatingPointError(f"{what}. {OUT_OF_RANGE}")
    if not trainer.diverged and not trainer.is_finite:
        run.end_diverged(trainer, measurements)
    elif not trainer.diverged:
        save_checkpoint(run, trainer, measurements, first)
    trainer.stepper.keep_evaluation_weights()
    run.keep_candidate(trainer, progress.last_finite_step)


def _prefetch(stream: BatchStream, begin: bool) -> Sequence[Batch]:
    """Draw the next step while the GPU works on this one.

    begin: whether the GPU may begin with it at once. Not where a restart changes the weights in between.
    """
    batches = stream.prefetch()
    return batches if begin else ()
