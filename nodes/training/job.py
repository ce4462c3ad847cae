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
from ...aclora_core.training import CandidateStore, Result
from .. import host
from .cancels import noticed, record_cancel
from .candidates import StepChoice, candidates_folder, may_be_kept
from .options.options import Options
from .requests import answering
from .several.count import process_count, sharing_text
from .several.server import train_on_several
from .status import CANCELLED, activity_text, headline, result_text
from .training import Training

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
        self.node, self.node_id, self.before = node, host.hidden_node_id(node), before
        self.again = bool(before)  # other images make ComfyUI run the node again, and are no reason to train again
        bar = host.ProgressBar(config.steps, self.node_id)
        dark = host.dark_theme()
        self.training = Training(model, latents, conditioning, chosen, config, step, bar, self.say, dark)

    def say(self, text: str) -> None:
        """Show a text on the node."""
        host.send_text(text, self.node_id)

    def run(self, remark: str) -> io.NodeOutput:
        """Train, and return the node's output. remark: for the end of the summary, with a space in front, or ""."""
        chosen, config = self.training.chosen, self.training.config
        processes = process_count(chosen.gpus)
        self.say(activity_text("loading"))
        self.training.display.show_before([image for batch in self.before for image in batch])
        if processes == 1:
            choice, result = self._alone()
        else:
            choice, result = self._kept_by_several(processes) or self._on_several(processes)
            remark = f" Trained on {sharing_text(processes, config)}.{remark}"
        adapter, report = _with_size(result.adapter, result.report)
        return self._output(adapter, report, choice, remark)

    def _alone(self) -> tuple[StepChoice, Result]:
        """Return the chosen step, described, from what was kept or by training in this process."""
        training = self.training

        def learn(network: host.HostModel, images: host.HostTrainingSet) -> tuple[StepChoice, Result]:
            choice = training.choice(network, images, host.processes().size, self.again)
            requests = training.requests(network, images)
            with answering(self.node_id, requests, draws=bool(training.previews.prompts)):
                result = choice.result(lambda: training.train(network, images, choice, requests))
            report = training.described(result.report, network.base_name, images.resolution)
            return choice, replace(result, report=report)

        with noticed(lambda: self.say(CANCELLED)):
            learned = training.opened(learn)
        if host.cancelled():
            host.clear_interrupt()
            record_cancel(self.node_id)
        return learned

    def _kept_by_several(self, processes: int) -> tuple[StepChoice, Result] | None:
        """Return the chosen step, described, if several processes have kept it before."""
        training = self.training

        def look(network: host.HostModel, images: host.HostTrainingSet) -> tuple[StepChoice, Result] | None:
            choice = training.choice(network, images, processes, self.again)
            result = choice.without_training()
            if result is None:
                return None
            report = training.described(result.report, network.base_name, images.resolution)
            return choice, replace(result, report=report)

        return training.opened(look) if may_be_kept(training.step, self.again) else None

    def _on_several(self, processes: int) -> tuple[StepChoice, Result]:
        """Return the chosen step, described, by training in several processes beside this one."""
        training = self.training
        ended, cancelled = train_on_several(
            training, processes, host.hidden_prompt(self.node), self.node_id, self.say, candidates_folder()
        )
        if cancelled:
            record_cancel(self.node_id)
        previews, config = training.previews, training.shared_config(processes)
        previews.images, previews.drawn_at = ended.previews, ended.drawn_at
        store = CandidateStore(candidates_folder(), ended.key)
        choice = StepChoice(store, config, training.step, training.name, previews.prompts, self.again)
        choice.trained = True
        result = choice.after_training(ended.result)
        return choice, replace(result, report=training.described(result.report, ended.base_model, ended.resolution))

    def _output(self, adapter: Adapter, report: RankReport, choice: StepChoice, remark: str) -> io.NodeOutput:
        training = self.training
        lora_model = to_state_dict(adapter)
        sheet = choice.ui(self.node, report.facts.started_at)
        result = result_text(report, training.chosen.checkpoints)
        summary = result + training.previews.remark + choice.remark + remark
        steps = training.config.steps
        picture, problem = training.display.keep_result(self.node, report, steps, summary, save=choice.trained)
        summary += problem and f" {problem}"
        shown = summary if problem else headline(result, report.facts.cancelled is not None)
        self.say(shown)  # replaces the status of the last step
        adapted, clip = host.apply_trained_lora(training.model, training.chosen.clip, lora_model)
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
