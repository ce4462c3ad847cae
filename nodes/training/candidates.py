"""The steps of a training that an artist can choose from, and the sheet of its previews: where they are kept."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ...aclora_core.adapter import RankReport, from_state_dict, to_state_dict
from ...aclora_core.config import TrainConfig
from ...aclora_core.text import error_reason
from ...aclora_core.training import (
    Candidates,
    CandidateStore,
    KeptResult,
    PreviewFiles,
    Result,
    choose,
    nearest_step,
)
from .. import host
from ..paths import check_name
from .sheet import preview_sheet, saved_sheet

FOLDER = "aclora_candidates"  # in ComfyUI's temp folder, which is emptied at its start
PREVIEWS = "aclora"  # in ComfyUI's output folder
_UNNAMED = "training"  # where the images are not from Load AC-LoRA Dataset

_SERVER = f"{os.getpid()}-{secrets.token_hex(4)}"  # servers that share a temp folder keep theirs apart
_chosen_from: set[str] = set()  # trainings whose last result is a chosen step

log = logging.getLogger("aclora")


def candidates_folder() -> Path:
    """Return the folder of the candidates of this server's trainings, which need not exist yet."""
    return Path(folder_paths.get_temp_directory(), FOLDER, _SERVER)


def may_be_kept(step: int, again: bool) -> bool:
    """Return whether a step may be there without training, so that it is worth opening the model to look for it.

    Args:
        step: that is asked for; 0 for the automatic one.
        again: whether the automatic step of a training that has ended is given once more without training.
    """
    return bool(step or again or _chosen_from) and candidates_folder().is_dir()


class StepChoice:
    """The choice of a step on the training node.

    Args:
        store: of the training's candidates.
        config: the settings.
        step: that is asked for; 0 for the automatic one.
        name: of the training, in names of files.
        prompts: of the images that are drawn.
        again: whether the automatic step of a training that has ended is given once more without training.
    """

    def __init__(
        self,
        store: CandidateStore,
        config: TrainConfig,
        step: int,
        name: str,
        prompts: Sequence[str],
        again: bool = False,
    ) -> None:
        self.store = store
        previews = Path(folder_paths.get_output_directory(), PREVIEWS)
        self.files = PreviewFiles(previews, name, prompts, protected=self.store.steps_to_show)
        self._config, self._step = config, step
        self._prompts, self._again = prompts, again
        self.kept: KeptResult | None = None
        self.problem = ""  # a sentence for the user
        self.trained = False  # whether this run had to train

    def candidates(self) -> Candidates:
        """Return what keeps the steps of a training."""
        self.trained = True
        return Candidates(self.store, self._config.steps, [self._step] if self._step else [])

    def result(self, train: Callable[[], Result]) -> Result:
        """Return the chosen step, from what was kept of this training if possible, else by training.

        Of several processes the first decides, and all get what it returns.
        """
        processes = host.processes()
        kept = self.without_training() if processes.is_first else None
        result = kept if processes.from_first(kept is not None) else train()
        if result is not None and result is not kept and processes.is_first:
            result = self.after_training(result)
        if processes.size == 1 and result is not None:
            return result
        # As tensors and text: the pack's classes may have other names on another machine.
        factors, report = processes.from_first(result and (to_state_dict(result.adapter), result.report.to_json()))
        return Result(from_state_dict(factors), RankReport.from_json(report))

    def without_training(self) -> Result | None:
        """Return the step if it was kept.

        The automatic step is trained for anew, unless another step of this training was chosen just before, or it is
        to be given again.
        """
        if self._step == 0 and self.store.folder.name not in _chosen_from and not self._again:
            return None
        try:
            self.kept = self.store.read_result()
            if self.kept is None or self._needs_more(self.kept) or not self._has_previews(self.kept):
                return None
            return self._choose(self.kept)
        except (OSError, ValueError) as error:
            reason = f"The kept steps of this training cannot be read ({error_reason(error)})"
            self.problem = f"{reason}, so it was trained again."
            log.warning("AC-LoRA: %s", self.problem)
            return None

    def after_training(self, result: Result) -> Result:
        """Return the chosen step of the training that has just ended, or its own result."""
        try:
            self.kept = self.store.read_result()
            return result if self.kept is None or self._step == 0 else self._choose(self.kept)
        except (OSError, ValueError) as error:
            self.problem = f"Step {self._step} could not be kept ({error_reason(error)}); the automatic one is used."
            log.warning("AC-LoRA: %s", self.problem)
            return result

    @property
    def remark(self) -> str:
        """Sentences on the node, with a space in front: what was chosen, and what else can be."""
        sentences = [self.problem] if self.problem else []
        if self.kept is not None:
            given = nearest_step(self.kept, self._step)
            if self._step not in (0, given):
                sentences.append(f"Step {self._step} was not kept; step {given}, the nearest, is used.")
            if self._step and self.kept.result.report.facts.cancelled is not None:
                sentences.append("The training was cancelled before its end.")
            if (self._step or self._again) and not self.trained:
                sentences.append("This step was kept, so nothing had to be trained.")
            others = [f"{step} (automatic)" if step == self.kept.step else str(step) for step in self._steps(self.kept)]
            sentences.append(f"Steps to choose from: {', '.join(others)}.")
            sentences.append("To use another, enter it as step and run again; that needs no training.")
        if self.files.folder is not None:
            sentences.append(f"Previews of the steps: output/{PREVIEWS}/{self.files.folder.name}.")
        return "".join(f" {sentence}" for sentence in sentences)

    def ui(self, cls: type[io.ComfyNode], training: float | None) -> dict[str, Any]:
        """Return the sheet of previews as the node shows it; that of a training is saved too. Empty without previews.

        training: when it was started, which tells whose previews are shown.
        """
        if self.files.folder is None and training is not None:  # of a training before this run
            self.files.begin(training, resumed=True)
        try:
            sheet = preview_sheet(self.files.sets(), self.kept, self._step, host.dark_theme())
            if sheet is None or self.files.folder is None:
                return {}
            if self.trained:
                return saved_sheet(sheet, self.files.folder)
            return ui.PreviewImage(sheet[None], cls=cls).as_dict()
        except OSError as error:  # a full disk must not cost the training
            self.problem = f"{self.problem} The sheet of previews could not be saved ({error_reason(error)}).".strip()
            log.warning("AC-LoRA: %s", self.problem)
            return {}

    def _choose(self, kept: KeptResult) -> Result:
        result = choose(self.store, kept, self._step, self._config)
        (_chosen_from.add if self._step else _chosen_from.discard)(self.store.folder.name)
        return result

    def _needs_more(self, kept: KeptResult) -> bool:
        """Whether a training that was cancelled has to go on for this step."""
        cancelled = kept.result.report.facts.cancelled is not None
        return cancelled and self._step not in (kept.step, *kept.steps)

    def _has_previews(self, kept: KeptResult) -> bool:
        """Whether the kept previews are those of the prompts, where the automatic step is to be given again."""
        if self._step or not self._again or not self._prompts:
            return True
        self.files.begin(kept.result.report.facts.started_at or 0.0, resumed=True)
        drawn = self.files.sets()
        return bool(drawn) and drawn[-1].prompts == list(self._prompts)

    @staticmethod
    def _steps(kept: KeptResult) -> list[int]:
        return sorted({kept.step, *kept.steps})


def training_name(conditioning: Sequence[Any]) -> str:
    """Return a training's name for files: that of its dataset's folder, where every system can write it with a step."""
    name = host.dataset_name(conditioning)
    try:
        for used in (name, f"{name}_step_000000"):
            check_name(name, used, f"output/{PREVIEWS}")
    except ValueError:
        return _UNNAMED
    return name
