"""Answers to what a user asks of a training while it runs, given between two steps."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from ..text import error_reason
from .compression import USED_RANKS, truncated, used_ranks_facts
from .progress import Result
from .report import make_report
from .requests import Requests
from .run import TrainingRun
from .trainer import Trainer

log = logging.getLogger("aclora")


def answer_requests(run: TrainingRun, trainer: Trainer) -> None:
    """Draw previews and save the adapter, where that is asked for; a fault is no reason to end."""
    requests = run.callbacks.requests
    if requests is None:
        return
    if requests.is_open("sample"):
        requests.answer("sample", _sample(run, trainer))
    if requests.is_open("save"):
        sentence = _save(run, trainer, requests)
        run.progress.note(sentence)
        requests.answer("save", sentence)


def _sample(run: TrainingRun, trainer: Trainer) -> str:
    """Draw previews, and keep the step to choose from where steps are kept; return a sentence for the user."""
    previews, candidates, step = run.callbacks.previews, run.callbacks.candidates, run.progress.step
    if previews is None:
        return "This training has no prompts to draw."
    if candidates and candidates.is_missing(run.progress.stage, step):
        run.keep_candidate(trainer, step)
    elif problem := previews.draw_now(trainer, step):
        run.progress.note(problem)
    if not previews.latest:
        return f"No previews of step {step} could be drawn; the text of the training says why."
    folder = previews.files.folder if previews.files else None
    return f"Previews of step {step} were drawn{f', and kept in {folder.parent.name}/{folder.name}' if folder else ''}."


def _save(run: TrainingRun, trainer: Trainer, requests: Requests) -> str:
    """Have the adapter saved as it is now; return a sentence for the user."""
    try:
        return requests.save(_result_now(run, trainer))
    except Exception as error:  # whatever a drive or a callback raises
        sentence = f"Step {run.progress.step} could not be saved ({error_reason(error)}); training goes on."
        log.warning("AC-LoRA: %s", sentence)
        return sentence


def _result_now(run: TrainingRun, trainer: Trainer) -> Result:
    """Return the adapter of this step with its report, truncated to its used ranks where no image is held out."""
    progress = run.progress
    with trainer.stepper.evaluation_weights():
        adapter = trainer.adapted.adapter()
    facts = replace(
        run.facts,
        chosen_step=progress.step,
        steps_run=progress.done,
        notes=" ".join(progress.notes),
        finished_at=time.time(),
    )
    if run.config.smallest and not progress.validation:
        whole, adapter = adapter, truncated(adapter, USED_RANKS)
        facts = used_ranks_facts(facts, whole, adapter)
    return Result(adapter, make_report(run.config, facts, progress, adapter, []))
