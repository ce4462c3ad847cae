"""Preview pictures on the training node: what is wished of them, and the picture that shows them below the chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ...aclora_core.inspection import contact_sheet
from ...aclora_core.training import Previews
from .. import host


@dataclass(frozen=True)
class PreviewWishes:
    """What to draw while a training runs.

    conditionings: the prompts as ComfyUI has encoded them, and last the empty one. guidance: the sampler's cfg.
    """

    every: int  # steps
    share: float  # of the training's time that they may take
    prompts: Sequence[str]
    conditionings: Sequence[Any]
    guidance: float
    vae: Any | None


class LivePreviews:
    """The latest pictures of what is wished, if anything is."""

    def __init__(self, wishes: PreviewWishes | None) -> None:
        self.wishes = wishes
        self.pictures: list[torch.Tensor] = []

    def drawn_with(self, model: host.HostModel, images: host.HostTrainingSet, seed: int) -> Previews | None:
        """As training takes them; None where none are wished."""
        wishes = self.wishes
        if wishes is None:
            return None

        def draw(done: int) -> None:
            encoded = model.encode_prompts(wishes.prompts) or wishes.conditionings
            drawn = host.draw(model, images, wishes.vae, encoded, seed, wishes.guidance)
            self.pictures = drawn or self.pictures

        return Previews(wishes.every, draw, wishes.share)

    @property
    def remark(self) -> str:
        """What is to be known of pictures that were drawn; nothing most often."""
        rough = self.pictures and self.wishes and self.wishes.vae is None
        return " Previews are rough, as no VAE is connected to AC-LoRA Preview Options." if rough else ""

    def below(self, chart: Image.Image) -> Image.Image:
        """The chart with the latest pictures under it."""
        return _stacked(chart, self.pictures, self.wishes.prompts) if self.wishes and self.pictures else chart


def _stacked(chart: Image.Image, pictures: Sequence[torch.Tensor], prompts: Sequence[str]) -> Image.Image:
    sheet = contact_sheet(pictures, prompts[: len(pictures)])
    lower = Image.fromarray((sheet * 255).round().byte().numpy())
    upper = chart.resize((lower.width, round(chart.height * lower.width / chart.width)), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (lower.width, upper.height + lower.height), "#ffffff")
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both
