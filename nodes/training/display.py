"""What the training node shows while it trains and afterwards: progress, chart, and preview images."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image

from ...aclora_core.adapter import RankReport
from ...aclora_core.inspection import contact_sheet, to_batch, training_picture
from ...aclora_core.storage import to_pil
from ...aclora_core.text import error_reason
from ...aclora_core.training import Activity, PreviewFiles, Previews, Progress
from .. import host
from .options.options import PreviewSettings
from .status import activity_text, status_text

PICTURE_PREFIX = "aclora/training"  # of the pictures in ComfyUI's output folder

_CHART_INTERVAL = 3.0  # seconds between two live charts

log = logging.getLogger("aclora")


class LivePreviews:
    """The latest preview images of a training, if previews are enabled.

    Args:
        settings: what to draw; None disables previews.
    """

    def __init__(self, settings: PreviewSettings | None) -> None:
        self.settings = settings
        self.images: list[torch.Tensor] = []  # each (height, width, 3), in 0 to 1
        self.drawn_at = 0  # step of the images

    def for_training(
        self, model: host.HostModel, images: host.HostTrainingSet, seed: int, files: PreviewFiles
    ) -> Previews | None:
        """Return the previews that train() takes, which keep the last images here; None if previews are disabled."""
        settings, processes = self.settings, host.processes()
        if settings is None:
            return None

        def draw(step: int) -> list[torch.Tensor]:
            # A text encoder that learns encodes the prompts anew each time.
            conditionings = model.encode_prompts(settings.prompts) or settings.conditionings
            own = processes.share(range(len(conditionings) - 1))  # the last is the empty prompt
            with processes.failing_together():
                if processes.is_first:
                    processes.call_for_help(step)
                found = host.sample_previews(model, images, settings.vae, conditionings, seed, settings.guidance, own)
                drawn = list(itertools.chain(*processes.gather(found)))
            if drawn:
                self.images, self.drawn_at = drawn, step
            return drawn

        return Previews(settings.every, draw, settings.share, files)

    @property
    def prompts(self) -> Sequence[str]:
        """What each image of a set shows; none if previews are disabled."""
        return self.settings.prompts if self.settings else ()

    @property
    def title(self) -> str:
        """Say of which step the images are."""
        return f"Drawn at step {self.drawn_at}" if self.drawn_at else "Drawn before the training"

    @property
    def remark(self) -> str:
        """A sentence that says why the images are blurred, with a space in front; empty if they are not."""
        blurred = self.images and self.settings and self.settings.vae is None
        return " Previews are blurred, as no VAE is connected to AC-LoRA Preview Options." if blurred else ""


class TrainingDisplay:
    """The node's live display, called after every step: moves the progress bar and redraws the picture now and then.

    Args:
        bar: of the node.
        previews: drawn while it trains.
        say: shows a text on the node.
        dark: whether the picture is dark.
    """

    def __init__(
        self, bar: host.ProgressBar, previews: LivePreviews, say: Callable[[str], None], dark: bool = True
    ) -> None:
        self.bar, self.previews, self.say, self.dark = bar, previews, say, dark
        self._last_chart = -math.inf  # when it was drawn, in seconds
        self._warned = False

    def __call__(self, progress: Progress) -> None:
        """Show the state of the training, with a picture if the last one is old enough or the training ends."""
        self.bar.total = progress.total + progress.remaining
        is_last = progress.done == progress.total or host.cancelled()
        image = None
        if is_last or time.monotonic() - self._last_chart > _CHART_INTERVAL:
            planned = progress.total - progress.done + len(progress.losses)
            image = self._drawn(lambda: self._picture(progress, planned))
            self._last_chart = time.monotonic()
        self.bar.show(progress.done, status_text(progress, self.bar), image)

    def show_before(self, images: Sequence[torch.Tensor]) -> None:
        """Show what the model draws without the style, until the first chart.

        Args:
            images: each (height, width, channels), in 0 to 1; none shows nothing.
        """
        if not images:
            return
        captions = ["without the style"] * len(images)
        if image := self._drawn(lambda: to_pil(contact_sheet(images, captions, dark=self.dark))):
            self.bar.show(0, "Drawn without the style, before the training", image)

    def begins(self, activity: Activity) -> None:
        """Say what is being done where that is no step."""
        self.say(activity_text(activity))

    def keep_result(
        self, cls: type[io.ComfyNode], report: RankReport, steps: int, summary: str, save: bool
    ) -> tuple[dict[str, Any], str]:
        """Draw the picture of the returned adapter, which stands on the node from then on.

        Args:
            cls: the node.
            report: of the training.
            steps: planned steps, the length of the chart's axis.
            summary: of the training.
            save: whether it belongs into ComfyUI's output folder, as that of each training, and not only onto the node.

        Returns:
            What the node shows, and "" or a sentence that says why it shows nothing.
        """
        try:
            picture = self._picture(report, steps, summary)
        except Exception as error:  # as in _drawn
            return self._without_picture("drawn", error)
        self.bar.show(self.bar.done, image=picture)
        pixels = to_batch([picture])
        try:
            if save:
                return ui.ImageSaveHelper.get_save_images_ui(pixels, PICTURE_PREFIX, cls).as_dict(), ""
            return ui.PreviewImage(pixels, cls=cls).as_dict(), ""
        except OSError as error:  # a full disk must not cost the training
            return self._without_picture("saved", error)

    def _without_picture(self, what: str, error: Exception) -> tuple[dict[str, Any], str]:
        problem = f"The picture of the training could not be {what} ({error_reason(error)})."
        log.warning("AC-LoRA: %s", problem)
        return {}, problem

    def _drawn(self, draw: Callable[[], Image.Image]) -> Image.Image | None:
        """Return what is drawn, or None where that fails: a training is worth more. The first failure is logged."""
        try:
            return draw()
        except Exception:  # whatever matplotlib or Pillow raises; ComfyUI's interrupt is none
            if not self._warned:
                log.warning("AC-LoRA: pictures on the node could not be drawn; training goes on.", exc_info=True)
            self._warned = True
            return None

    def _picture(self, trajectory: RankReport | Progress, steps: int, summary: str = "") -> Image.Image:
        images = self.previews.images
        captions = self.previews.prompts[: len(images)]
        return training_picture(trajectory, steps, images, captions, self.previews.title, summary, self.dark)
