"""A training of the node in this process: the model opened, what it keeps, and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ...aclora_core.adapter import RankReport
from ...aclora_core.config import TrainConfig
from ...aclora_core.distributed import OtherProcessError
from ...aclora_core.training import Requests, Result, TooLittleMemoryError, open_candidate_store, train
from .. import host
from .candidates import StepChoice, candidates_folder, training_name
from .display import LivePreviews, TrainingDisplay
from .options.options import Options
from .requests import save_now
from .status import STREAMED_INSTEAD

_Done = TypeVar("_Done")


class Training:
    """What a training needs, and how it is shown.

    Args:
        model: the MODEL.
        latents: of one image each.
        conditioning: the caption of each image.
        chosen: from the options nodes.
        config: the settings.
        step: that is asked for; 0 for the automatic one.
        bar: the node's progress bar.
        say: shows a text on the node.
        dark: whether pictures are dark.
    """

    def __init__(
        self,
        model: Any,
        latents: Sequence[dict[str, Any]],
        conditioning: Sequence[Any],
        chosen: Options,
        config: TrainConfig,
        step: int,
        bar: host.ProgressBar,
        say: Callable[[str], None],
        dark: bool,
    ) -> None:
        self.model, self.latents, self.conditioning = model, latents, conditioning
        self.chosen, self.config, self.step = chosen, config, step
        self.previews = LivePreviews(chosen.previews)
        self.display = TrainingDisplay(bar, self.previews, say, dark)

    @property
    def name(self) -> str:
        """The training's name for files; the conditioning has to have been checked."""
        return training_name(self.conditioning)

    def shared_config(self, processes: int) -> TrainConfig:
        """Return the settings of one process that trains what so many train together."""
        return replace(self.config, batch_size=self.config.batch_size * processes)

    def opened(self, work: Callable[[host.HostModel, host.HostTrainingSet], _Done]) -> _Done:
        """Return what the work returns, which gets the model and its images opened for training.

        Where no step fits beside the weights of the model in one of the processes, all open it again with its weights
        streamed.
        """
        previews = self.chosen.previews
        limits = host.memory_limits(self.config.gpu_memory, previews.vae if previews else None)
        try:
            return self._opened(limits, work)
        except TooLittleMemoryError as error:
            if not error.whole:
                raise
            host.processes().any(True)
        except OtherProcessError:
            if not _another_streams():
                raise
        self.display.say(STREAMED_INSTEAD)  # outside of the handler, which holds what the failed attempt has allocated
        return self._opened(replace(limits, stream=True), work)

    def _opened(
        self, limits: host.MemoryLimits, work: Callable[[host.HostModel, host.HostTrainingSet], _Done]
    ) -> _Done:
        previews = self.chosen.previews
        unconditional = self.chosen.unconditional if self.config.needs_unconditional else None
        prompts = previews.conditionings[:-1] if previews else ()  # the last is the empty prompt
        with host.training_session(
            self.model, self.latents, self.conditioning, self.chosen.clip, unconditional, prompts, limits
        ) as (network, images):
            return work(network, images)

    def choice(
        self,
        network: host.HostModel,
        images: host.HostTrainingSet,
        processes: int,
        again: bool = False,
        folder: Path | None = None,
        identity: str | None = None,
    ) -> StepChoice:
        """Return the choice of a step of this training.

        Args:
            network: the model, opened for training.
            images: to learn from.
            processes: that train together.
            again: whether the automatic step of a training that has ended is given once more without training.
            folder: of all trainings' candidates; that of this server if None.
            identity: what tells the MODEL from others; that of this process's MODEL if None.
        """
        config = self.shared_config(processes)
        identity = host.model_identity(self.model) if identity is None else identity
        store = open_candidate_store(folder or candidates_folder(), network, images, config, identity)
        return StepChoice(store, config, self.step, self.name, self.previews.prompts, again)

    def requests(self, network: host.HostModel, images: host.HostTrainingSet) -> Requests:
        """Return what others may ask of this training while it runs."""
        return Requests(lambda result: self.saved(result, network, images))

    def saved(self, result: Result, network: host.HostModel, images: host.HostTrainingSet) -> str:
        """Save a LoRA of this training into models/loras/aclora and return a sentence for the user.

        Raises:
            ValueError, OSError: it cannot be saved.
        """
        described = replace(result, report=self.described(result.report, network.base_name, images.resolution))
        return save_now(described, self.name, self.previews.images)

    def train(
        self, network: host.HostModel, images: host.HostTrainingSet, choice: StepChoice, requests: Requests
    ) -> Result:
        """Train. Of several processes the first one shows, and keeps what there is to choose from."""
        processes = host.processes()
        return train(
            network,
            images,
            self.config,
            self.display if processes.is_first else lambda progress: None,
            host.cancelled,
            checkpoints=self.chosen.checkpoints,
            previews=self.previews.for_training(network, images, self.config.seed, choice.files),
            candidates=choice.candidates() if processes.is_first else None,
            processes=processes,
            on_activity=self.display.begins,
            requests=requests if processes.is_first else None,
        )

    def described(self, report: RankReport, base_model: str, resolution: str) -> RankReport:
        """Return a report with what is known of the node's inputs.

        Args:
            report: of the training.
            base_model: ComfyUI's name for the kind of model.
            resolution: of the images.
        """
        trigger = host.trigger_word(self.conditioning)
        facts = replace(report.facts, base_model=base_model, resolution=resolution, trigger=trigger)
        if note := host.training_note(self.model):
            facts = replace(facts, notes=f"{note} {facts.notes}".strip())
        return replace(report, facts=facts, tags=host.tag_counts(self.latents, self.conditioning))


def _another_streams() -> bool:
    """Return whether another process has failed for lack of memory alone, and goes on with its weights streamed."""
    try:
        return host.processes().any(False)
    except OtherProcessError:
        return False
