"""Save where a training stands, and continue from there."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..adapter import TrainingFacts
from .checkpoint import restoring
from .early_stopping import EarlyStopping
from .first_pass import FirstPass
from .measurements import Measurements
from .run import TrainingRun
from .trainer import Trainer

log = logging.getLogger("aclora")


def save_checkpoint(
    run: TrainingRun, trainer: Trainer, measurements: Measurements | None, first: FirstPass | None
) -> None:
    """Write a checkpoint, where they are on; one that cannot be written is no reason to end.

    Args:
        run: the training.
        trainer: of the pass that runs.
        measurements: of the pass that runs; None in a refit.
        first: what the first pass found, in a checkpoint of the second.
    """
    name, step = "refit" if first else "first", run.progress.step
    if run.store is None or run.store.has(name, step):
        return
    began = time.monotonic()
    state: dict[str, Any] = {
        "work": trainer.state_dict(),
        "progress": run.progress.state_dict(),
        "facts": run.facts.to_dict(),
        "measuring_seconds": run.facts.validation_seconds or 0.0,
        "planned": run.config.steps,
    }
    if first:
        state |= {"found": first.state_dict(), "first_progress": first.progress.state_dict()}
    if isinstance(measurements, EarlyStopping):
        state["validation"] = measurements.state_dict()
    elif measurements:
        state["fit"] = measurements.state_dict()
    if problem := run.store.write(name, step, state):
        run.progress.note(problem)
    seconds = (run.facts.checkpoint_seconds or 0.0) + time.monotonic() - began
    run.facts = replace(run.facts, checkpoint_seconds=seconds)


def restore_facts(run: TrainingRun, state: Mapping[str, Any]) -> None:
    """Take over the facts of a checkpoint.

    Raises:
        DamagedCheckpointError: they cannot be restored.
    """
    with restoring():
        facts = TrainingFacts.from_dict(state["facts"])
        seconds = float(state["measuring_seconds"])
    run.facts = replace(facts, cancelled=None, checkpoint_seconds=None, validation_seconds=seconds)


def resume_pass(
    run: TrainingRun, state: Mapping[str, Any], trainer: Trainer, measurements: Measurements | None
) -> None:
    """Continue a pass from a checkpoint.

    Raises:
        ValueError: more steps are asked of a training that would stop at once.
        DamagedCheckpointError: the state cannot be restored.
    """
    progress = run.progress
    with restoring():
        _restore(run, state, trainer, measurements)
    measures_fit = measurements is not None and not isinstance(measurements, EarlyStopping)
    if measurements and measures_fit and progress.step and not measurements.history:
        run.measure_model(trainer, measurements)  # the first measurement was cancelled, or never made
    if measurements and progress.restarts:
        measurements.last_restart = progress.restarts[-1].step
    asks_for_more = state["planned"] < run.config.steps
    if asks_for_more and measurements and run.config.stop_early and measurements.ends_training():
        raise ValueError(
            f"This training had stopped by itself at step {progress.step}: {measurements.reason}. It would stop again "
            "at once. To continue nevertheless, switch stop_early off."
        )
    log.info("AC-LoRA: resumed at step %d of %d.", progress.done, progress.total)


def _restore(run: TrainingRun, state: Mapping[str, Any], trainer: Trainer, measurements: Measurements | None) -> None:
    progress = run.progress
    trainer.load_state_dict(state["work"])
    total = progress.total
    progress.load_state_dict(state["progress"])
    progress.total = total
    if isinstance(measurements, EarlyStopping):
        measurements.load_state_dict(state["validation"])
        progress.validation = measurements.history
    elif measurements:
        measurements.load_state_dict(state.get("fit", {"history": []}))  # checkpoints of 0.3.0 have none
        progress.fit = measurements.history
