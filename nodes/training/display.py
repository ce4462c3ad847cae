"""What the training node shows: progress, live chart, preview images, and the summary at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from PIL import Image

from ...aclora_core.adapter import RankReport, Stage, fit_share, recent_loss
from ...aclora_core.inspection import contact_sheet, training_chart
from ...aclora_core.text import percent_text
from ...aclora_core.training import Previews, Progress, training_summary
from .. import host
from .options.options import PreviewSettings

_CHART_INTERVAL = 2.0  # seconds between two live charts
_STAGE_TEXT: dict[Stage, str] = {
    "training": "training",
    "cutting": "finding the smallest size",
    "training on all": "second pass, on all images",
    "comparing": "drawing unseen prompts with and without the LoRA",
}


class LivePreviews:
    """The latest preview images of a training, if previews are enabled.

    Args:
        settings: what to draw; None disables previews.
    """

    def __init__(self, settings: PreviewSettings | None) -> None:
        self.settings = settings
        self.images: list[torch.Tensor] = []  # each (height, width, 3), in 0 to 1

    def for_training(self, model: host.HostModel, images: host.HostTrainingSet, seed: int) -> Previews | None:
        """Return the previews that train() takes, which keep their images here; None if previews are disabled."""
        settings = self.settings
        if settings is None:
            return None

        def draw(done: int) -> list[torch.Tensor]:
            # A text encoder that learns encodes the prompts anew each time.
            conditionings = model.encode_prompts(settings.prompts) or settings.conditionings
            drawn = host.sample_previews(model, images, settings.vae, conditionings, seed, settings.guidance)
            if drawn:
                self.images = drawn
            return drawn

        return Previews(settings.every, draw, settings.share)

    @property
    def prompts(self) -> Sequence[str]:
        """What each image of a set shows; none if previews are disabled."""
        return self.settings.prompts if self.settings else ()

    @property
    def remark(self) -> str:
        """A sentence that says why the images are blurred, with a space in front; empty if they are not."""
        blurred = self.images and self.settings and self.settings.vae is None
        return " Previews are blurred, as no VAE is connected to AC-LoRA Preview Options." if blurred else ""

    def add_below(self, chart: Image.Image) -> Image.Image:
        """Return the chart with the latest images below it, or the chart itself if there are none."""
        if not self.settings or not self.images:
            return chart
        return _stack(chart, self.images, self.settings.prompts)


class TrainingDisplay:
    """The node's live display, called after every step: moves the progress bar and redraws the chart now and then."""

    def __init__(self, bar: host.ProgressBar, previews: LivePreviews) -> None:
        self.bar = bar
        self.previews = previews
        self._last_chart = -math.inf  # when it was drawn, in seconds

    def __call__(self, progress: Progress) -> None:
        """Show the state of the training, with a chart if the last one is old enough or the training ends."""
        self.bar.total = progress.total + progress.remaining
        is_last = progress.done == progress.total or host.cancelled()
        image = None
        if is_last or time.monotonic() - self._last_chart > _CHART_INTERVAL:
            planned = progress.total - progress.done + len(progress.losses)
            chart = training_chart(progress.losses, planned, progress.restarts, progress.validation, fit=progress.fit)
            image = self.previews.add_below(chart)
            self._last_chart = time.monotonic()
        self.bar.show(progress.done, status_text(progress, self.bar), image)

    def show_before(self, images: Sequence[torch.Tensor]) -> None:
        """Show what the model draws without the style, until the first chart.

        Args:
            images: each (height, width, 3), in 0 to 1; none shows nothing.
        """
        if images:
            sheet = contact_sheet(images, ["without the style"] * len(images))
            image = Image.fromarray((sheet * 255).round().byte().numpy())
            self.bar.show(0, "Drawn without the style, before the training", image)

    def show_result(self, report: RankReport, steps: int) -> None:
        """Show the chart of the returned adapter, after a cancel, during which ComfyUI shows no images.

        Args:
            report: of the training.
            steps: planned steps, the length of the chart's axis.
        """
        chart = training_chart(report.losses, steps, report.restarts, report.validation, fit=report.fit)
        self.bar.show(self.bar.done, image=self.previews.add_below(chart))


def status_text(progress: Progress, bar: host.ProgressBar) -> str:
    """Return the text below the chart while a training runs: stage, losses, time left, memory, latest note."""
    loss = recent_loss(progress.losses)
    parts = [_STAGE_TEXT[progress.stage], "no finite loss" if loss is None else f"loss {loss:.3f}"]
    if progress.validation:
        parts.append(f"held-out loss {progress.validation[-1][1]:.3f}")
    share = fit_share(progress.fit)
    if share is not None:
        parts.append(f"own images at {percent_text(share)} of the model's loss")
    parts.append(f"learning rate {progress.learning_rate:.2g}")
    if progress.skipped_steps:
        parts.append(f"skipped steps: {progress.skipped_steps}")
    if progress.resumed_at:
        parts.append(f"resumed at step {progress.resumed_at}")
    time_left = bar.time_left(progress.done, progress.resumed_at)
    # A second pass is as long as the first took to its best step, which is not known yet.
    parts.append(f"up to {time_left}" if progress.remaining else time_left)
    lines = [", ".join(parts)]
    if progress.memory:
        lines.append(progress.memory)
    lines += progress.notes[-1:]
    return "\n".join(lines)


def result_text(report: RankReport, can_resume: bool) -> str:
    """Return the summary of a training that has ended; after a cancel also what to do next.

    Args:
        report: of the training.
        can_resume: whether it has checkpoints.
    """
    summary = training_summary(report)
    if report.facts.cancelled is None:
        return summary
    if can_resume:
        return f"{summary} Run again to resume."
    return f"{summary} Running again returns this same result; change the seed to train from the start."


def _stack(chart: Image.Image, images: Sequence[torch.Tensor], prompts: Sequence[str]) -> Image.Image:
    """Return the chart, scaled to the width of the contact sheet of the images, above that sheet."""
    sheet = contact_sheet(images, prompts[: len(images)])
    lower = Image.fromarray((sheet * 255).round().byte().numpy())
    height = round(chart.height * lower.width / chart.width)
    upper = chart.resize((lower.width, height), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (lower.width, upper.height + lower.height), "#ffffff")
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both
