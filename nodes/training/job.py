"""One run of the training node: from its inputs to what it returns and shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...aclora_core.adapter import Adapter, RankReport, build_metadata, file_size, to_state_dict
from ...aclora_core.config import TrainConfig
from ...aclora_core.training import Requests, Result, TooLittleMemoryError, train
from .. import host
from .cancels import noticed, record_cancel
from .candidates import StepChoice, training_name
from .display import LivePreviews, TrainingDisplay
from .options.options import Options
from .requests import answering, save_step
from .status import CANCELLED, STREAMED_INSTEAD, activity_text, headline, result_text

_NO_CLIP = (
    "Train AC-LoRA outputs a clip only if AC-LoRA Text Encoder Options is connected to its options. Connect the "
    "loader's clip instead."
)


class TrainingJob:
    """Trains as the node is asked to, and shows it.

    Args:
        node: the node's class, as ComfyUI runs it.
        model: the MODEL.
        latents: of one image each.
        conditioning: the caption of each image.
        chosen: from the options nodes.
        config: the settings.
        step: that is asked for; 0 for the automatic one.
        before: images drawn without the style, in batches.
    """

    def __init__(
        self,
        node: type[io.ComfyNode],
        model: Any,
        latents: Sequence[dict[str, Any]],
        conditioning: Sequence[Any],
        chosen: Options,
        config: TrainConfig,
        step: int,
        before: Sequence[Tensor],
    ) -> None:
        self.node, self.node_id = node, host.hidden_node_id(node)
        self.model, self.latents, self.conditioning = model, latents, conditioning
        self.chosen, self.config, self.step, self.before = chosen, config, step, before
        self.previews = LivePreviews(chosen.previews)
        bar = host.ProgressBar(config.steps, self.node_id)
        self.display = TrainingDisplay(bar, self.previews, self.say, host.dark_theme())

    @property
    def name(self) -> str:
        """The training's name for files; the conditioning has to have been checked."""
        return training_name(self.conditioning)

    def say(self, text: str) -> None:
        """Show a text on the node."""
        host.send_text(text, self.node_id)

    def run(self, remark: str) -> io.NodeOutput:
        """Train, and return the node's output. remark: for the end of the summary, with a space in front, or ""."""
        self.say(activity_text("loading"))
        self.display.show_before([image for batch in self.before for image in batch])
        with noticed(lambda: self.say(CANCELLED)):
            adapter, report, choice = self._learned()
        if host.cancelled():
            host.clear_interrupt()
            record_cancel(self.node_id)
        return self._output(adapter, report, choice, remark)

    def _learned(self) -> tuple[Adapter, RankReport, StepChoice]:
        """Return the adapter, its report, and what else can be chosen."""
        previews = self.chosen.previews
        limits = host.memory_limits(self.config.gpu_memory, previews.vae if previews else None)
        try:
            return self._learned_within(limits)
        except TooLittleMemoryError as error:
            if not error.whole:
                raise
        self.say(STREAMED_INSTEAD)  # outside of the handler, which holds what the failed attempt has allocated
        return self._learned_within(replace(limits, stream=True))

    def _learned_within(self, limits: host.MemoryLimits) -> tuple[Adapter, RankReport, StepChoice]:
        with self._session(limits) as (network, images):
            # Other images in `before` make ComfyUI run the node again, and are no reason to train again.
            again, prompts = bool(self.before), self.previews.prompts
            choice = StepChoice(self.model, network, images, self.config, self.step, self.name, prompts, again)
            return *self._result(network, images, choice), choice

    def _session(self, limits: host.MemoryLimits) -> Any:
        previews = self.chosen.previews
        unconditional = self.chosen.unconditional if self.config.needs_unconditional else None
        prompts = previews.conditionings[:-1] if previews else ()  # the last is the empty prompt
        return host.training_session(
            self.model, self.latents, self.conditioning, self.chosen.clip, unconditional, prompts, limits
        )

    def _result(
        self, network: host.HostModel, images: host.HostTrainingSet, choice: StepChoice
    ) -> tuple[Adapter, RankReport]:
        """Return the adapter of the chosen step and its report, with what is known of the node's inputs."""

        def save_now(now: Result) -> str:
            described = replace(now, report=self._described(now.report, network, images))
            return save_step(described, self.name, self.previews.images)

        requests = Requests(save_now)
        with answering(self.node_id, requests, draws=bool(self.previews.prompts)):
            result = choice.result(lambda: self._train(network, images, choice, requests))
        return _with_size(result.adapter, self._described(result.report, network, images))

    def _train(
        self, network: host.HostModel, images: host.HostTrainingSet, choice: StepChoice, requests: Requests
    ) -> Result:
        # Of several processes the first one shows, and keeps what there is to choose from.
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

    def _described(self, report: RankReport, network: host.HostModel, images: host.HostTrainingSet) -> RankReport:
        """Return a report with what is known of the node's inputs."""
        trigger = host.trigger_word(self.conditioning)
        facts = replace(report.facts, base_model=network.base_name, resolution=images.resolution, trigger=trigger)
        if note := host.training_note(self.model):
            facts = replace(facts, notes=f"{note} {facts.notes}".strip())
        return replace(report, facts=facts, tags=host.tag_counts(self.latents, self.conditioning))

    def _output(self, adapter: Adapter, report: RankReport, choice: StepChoice, remark: str) -> io.NodeOutput:
        lora_model = to_state_dict(adapter)
        sheet = choice.ui(self.node, report.facts.started_at)
        result = result_text(report, self.chosen.checkpoints)
        summary = result + self.previews.remark + choice.remark + remark
        steps = self.config.steps
        picture, problem = self.display.keep_result(self.node, report, steps, summary, save=choice.trained)
        summary += problem and f" {problem}"
        shown = summary if problem else headline(result, report.facts.cancelled is not None)
        self.say(shown)  # replaces the status of the last step
        adapted, clip = host.apply_trained_lora(self.model, self.chosen.clip, lora_model)
        # A non-finite number would make ComfyUI's Plot Loss Graph fail, and every node after it.
        losses = [loss for loss in report.losses if math.isfinite(loss)]
        clip_output = clip or host.block_output(_NO_CLIP)
        images = [*picture.get("images", ()), *sheet.get("images", ())]
        texts = {"text": (summary,), "headline": (shown,)}
        return io.NodeOutput(adapted, lora_model, {"loss": losses}, report, clip_output, ui={"images": images, **texts})


def _with_size(adapter: Adapter, report: RankReport) -> tuple[Adapter, RankReport]:
    """Return the adapter with what the training knows, so that Save needs no report, and both with their size."""
    size = file_size(adapter, build_metadata(adapter, "", report))
    report = replace(report, facts=replace(report.facts, file_size=size))
    return replace(adapter, metadata=build_metadata(adapter, "", report)), report
