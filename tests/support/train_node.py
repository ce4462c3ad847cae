"""Run the node Train AC-LoRA as ComfyUI does."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Return the node's outputs: every input is a list, in inference mode.

    settings: settings of TrainConfig, of the node itself or of its options. others: further fields of the options.
    """
    return tuple(run_node(pack, model, latents, conditioning, settings, **others).result)


def run_node(
    pack: ModuleType,
    model: Any,
    latents: Any,
    conditioning: Any,
    settings: dict[str, Any],
    before: Sequence[torch.Tensor] = (),
    **others: Any,
) -> Any:
    """Return the outputs as `train` does, together with what the node shows: NodeOutput's result and ui."""
    node = pack.nodes.training.node.ACLoRATrain
    own = {widget.id for widget in node.define_schema().inputs} & settings.keys()
    more = {name: value for name, value in settings.items() if name not in own}
    options = pack.nodes.training.options.options.Options(more, **others)
    lists = {name: [settings[name]] for name in own}
    with torch.inference_mode():
        return node.execute([model], latents, conditioning, options=[options], before=before, **lists)
