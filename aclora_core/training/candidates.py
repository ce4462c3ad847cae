"""Candidates: the adapter at several steps of a training, from which the user may choose another than the best."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..adapter import Adapter, Stage, Truncation
from ..config import TrainConfig
from ..diffusion import DiffusionModel, TrainingSet
from ..storage import content_hash
from .candidate_store import CandidateStore, KeptResult
from .checks import check_inputs
from .compression import USED_RANKS, truncated, used_ranks_facts
from .fingerprint import training_fingerprint
from .progress import Progress, Result
from .report import make_report
from .sampler import captioned_indices

# Steps are taken while a file is hashed and written, which takes a second for a LoRA of 100 MB.
_WRITER = ThreadPoolExecutor(1, thread_name_prefix="AC-LoRA candidates")

COUNT = 8  # evenly spaced steps; the last step and the returned one are kept besides


def candidate_steps(planned: int, count: int = COUNT) -> list[int]:
    """Return evenly spaced steps, at most `count` of them, the last not after the planned end."""
    interval = -(-planned // count)
    return list(range(interval, planned + 1, interval))


def open_candidate_store(
    root: Path, model: DiffusionModel, images: TrainingSet, config: TrainConfig, identity: str = ""
) -> CandidateStore:
    """Return the store of a training's candidates, which the next training with the same result finds again.

    Args:
        root: folder of all trainings. Nobody else may write to it.
        model: the frozen model, without an adapter on it.
        images: latents and conditionings.
        config: the settings; those without an effect on the result do not count.
        identity: what else tells this model from others.

    Raises:
        ValueError: the images lack something that the settings need.
    """
    indices = captioned_indices(images)
    check_inputs(images, config, indices)
    fingerprint = training_fingerprint(model, images, config, indices)
    return CandidateStore(root, content_hash(fingerprint.state_dict(), identity))


class Candidates:
    """Keeps the adapter at evenly spaced steps, at the last one, and at the one that the training returns.

    A second pass, which has more images to learn from, replaces the steps of the first.

    Args:
        store: where they are kept.
        planned: steps of the training.
        wanted: further steps to keep.

    Attributes:
        dtype: in which adapters are kept.
    """

    dtype = torch.float16

    def __init__(self, store: CandidateStore, planned: int, wanted: Collection[int] = ()) -> None:
        self.store = store
        self.steps = {*candidate_steps(planned), *wanted}
        self.failed = False  # whether one could not be kept; then none is any more
        self._kept: set[tuple[Stage, int]] = set()
        self._writing: Future[None] | None = None

    def begin(self, resumed: bool) -> None:
        """Start a training; one that is not resumed has no candidates yet."""
        self._kept.clear()
        with suppress(Exception):  # of an attempt before
            self.wait()
        if not resumed:
            _WRITER.submit(self.store.clear).result()  # there, as a training that failed may still write

    def is_due(self, step: int) -> bool:
        """Return whether to keep the adapter after this step."""
        return step in self.steps

    def is_missing(self, stage: Stage, step: int) -> bool:
        """Return whether this pass has not kept this step yet, and still keeps any."""
        return not self.failed and (stage, step) not in self._kept

    def keep(self, step: int, adapter: Adapter, progress: Progress) -> None:
        """Keep the adapter of a step; it is written while the training goes on.

        Args:
            step: 0 stands for the model without an adapter, of which nothing is kept.
            adapter: whole, in `dtype`, as the training would return it at this step.
            progress: of the pass that trained it.

        Raises:
            OSError: the one before it cannot be kept.
        """
        self._kept.add((progress.stage, step))
        if step:
            self.wait()
            self.store.coming = {step}
            self._writing = _WRITER.submit(self.store.write_step, step, adapter, progress.state_dict())

    def finish(self, result: Result, step: int, truncation: Truncation) -> None:
        """Keep what the training returns; without it no candidate can be chosen.

        Args:
            result: of the training.
            step: that its adapter is of.
            truncation: of its adapter; a candidate that is chosen is truncated in the same way.

        Raises:
            ValueError, OSError: it cannot be kept.
        """
        self.wait()
        self.store.write_result(result, step, truncation)

    def wait(self) -> None:
        """Wait until the last step is written.

        Raises:
            OSError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing:
            try:
                writing.result()
            finally:
                self.store.coming = set()


def choose(store: CandidateStore, kept: KeptResult, step: int, config: TrainConfig) -> Result:
    """Return the adapter of a step, or of the nearest one that was kept, without training.

    It is truncated by the rule that the training found for its own result. The step of that result, and 0, give the
    result itself.

    Args:
        store: of the training.
        kept: what the training returned.
        step: that is asked for; 0 for the one that the training chose.
        config: the settings of the training.

    Returns:
        The adapter with its report, whose facts say which step it is of.

    Raises:
        FileNotFoundError: the file of the step is not there any more.
        ValueError: it is damaged.
    """
    nearest = nearest_step(kept, step)
    if nearest == kept.step:
        return kept.result
    whole, progress = store.read_step(nearest)
    adapter = truncated(whole, kept.truncation)
    # How many epochs it has seen, what a truncation of it loses and what unseen prompts gain, is not known.
    facts = replace(
        kept.result.report.facts,
        chosen_step=nearest,
        epochs=None,
        cancelled=None,
        unseen_prompts=None,
        style_gained=None,
        content_kept=None,
        copied_share=None,
    )
    if kept.truncation == USED_RANKS:
        facts = used_ranks_facts(facts, whole, adapter)
    return Result(adapter, make_report(config, facts, progress, adapter, []))


def nearest_step(kept: KeptResult, step: int) -> int:
    """Return the kept step that is nearest to the one that is asked for; 0 asks for the automatic one."""
    if step == 0:
        return kept.step
    return min([kept.step, *kept.steps], key=lambda each: (abs(each - step), each))
