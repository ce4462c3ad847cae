"""Train AC-LoRA called as the host calls it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


def train(
    pack: ModuleType,
    model: Any,
    latents: Any,
    conditioning: Any,
    settings: dict[str, Any],
    **others: Any,
) -> tuple[Any, ...]:
    """The node's outputs: every input a list, under inference mode. settings: of TrainConfig, the node's own or not.

    others: what the options hold besides.
    """
    node = pack.nodes.training.node.ACLoRATrain
    own = {widget.id for widget in node.define_schema().inputs} & settings.keys()
    more = {name: value for name, value in settings.items() if name not in own}
    options = pack.nodes.training.options.options.Options(more, **others)
    lists = {name: [settings[name]] for name in own}
    with torch.inference_mode():
        return node.execute([model], latents, conditioning, options=[options], **lists).result
