"""Preview pictures on the training node: its inputs for them, and the picture that shows them below the chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image

from ..aclora_core.contact_sheet import contact_sheet
from ..aclora_core.previews import Previews
from . import host

_EVERY, _PROMPTS = "preview_every", "preview_prompts"
_MOST = 8  # prompts


def inputs() -> list[Any]:
    """Optional, so that graphs from before they came still run."""
    return [
        io.Int.Input(
            _EVERY, default=0, min=0, max=100_000, optional=True, advanced=True,
            tooltip="Steps between two sets of preview pictures, drawn with the style as it is and shown on this node. "
            "0 draws none. Each picture takes as long as some 5 to 10 steps.",
        ),
        io.String.Input(
            _PROMPTS, default="", multiline=True, optional=True, advanced=True,
            tooltip="What the previews show: one prompt a line, eight at most. Connect clip for them.",
        ),
        io.Clip.Input(
            "clip", optional=True, advanced=True, tooltip="The text encoder, for the prompts of the previews alone."
        ),
        io.Vae.Input(
            "vae", optional=True, advanced=True,
            tooltip="The VAE, for the previews alone. Without one, or without memory for it, they are small and "
            "blurred.",
        ),
    ]  # fmt: skip


class LivePreviews:
    """What the previews need, taken out of the values of all inputs, and the latest pictures.

    Raises:
        ValueError: there are prompts missing, or what encodes them.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.every = values.pop(_EVERY, 0)
        lines = (line.strip() for line in values.pop(_PROMPTS, "").splitlines())
        self.prompts = [line for line in lines if line][:_MOST]
        clip, self._vae = values.pop("clip", None), values.pop("vae", None)
        self.pictures: list[torch.Tensor] = []
        if not self.every:
            return
        if not self.prompts:
            raise ValueError(f"There is nothing to preview. Write prompts into {_PROMPTS}, or set {_EVERY} to 0.")
        if clip is None:
            raise ValueError(f"Previews need the text encoder. Connect clip, or set {_EVERY} to 0.")
        self._conditionings = host.encoded(clip, self.prompts)

    def drawn_with(self, trainable: host.TrainableModel, seed: int) -> Previews | None:
        """As training takes them; None where none are wished."""

        def draw(done: int) -> None:
            self.pictures = host.draw(trainable, self._vae, self._conditionings, seed) or self.pictures

        return Previews(self.every, draw) if self.every else None

    def below(self, chart: Image.Image) -> Image.Image:
        """The chart with the latest pictures under it."""
        return _stacked(chart, self.pictures, self.prompts) if self.pictures else chart


def _stacked(chart: Image.Image, pictures: Sequence[torch.Tensor], prompts: Sequence[str]) -> Image.Image:
    sheet = contact_sheet(pictures, prompts[: len(pictures)], ())
    lower = Image.fromarray((sheet * 255).round().byte().numpy())
    upper = chart.resize((lower.width, round(chart.height * lower.width / chart.width)), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (lower.width, upper.height + lower.height), "#ffffff")
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both
