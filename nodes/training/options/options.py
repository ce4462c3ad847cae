"""What options nodes hand on to each other, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ....aclora_core.config import CheckpointConfig, TrainConfig
from ..display import PreviewWishes

if TYPE_CHECKING:
    from comfy.sd import CLIP

TYPE = io.Custom("ACLORA_OPTIONS")


@dataclass(frozen=True)
class Options:
    """What the nodes of a chain set; nothing here means the default. It is never changed, only replaced.

    settings: of TrainConfig, by name.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: CheckpointConfig | None = None
    previews: PreviewWishes | None = None
    clip: CLIP | None = None  # that learns too

    def with_settings(self, settings: Mapping[str, Any]) -> Options:
        """These options with further settings, which count instead of those that are there."""
        return replace(self, settings={**self.settings, **settings})


def schema(node_id: str, name: str, description: str, inputs: list[Any], search_aliases: list[str]) -> io.Schema:
    """The schema of an options node."""
    chained = TYPE.Input(
        "options",
        optional=True,
        tooltip="Another options node, whose settings hold as well. Where both set the same, this node counts.",
    )
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category="AC-LoRA/options",
        description=f"{description} Connect it to the options of Train AC-LoRA.",
        search_aliases=search_aliases,
        inputs=[chained, *inputs],
        outputs=[TYPE.Output(display_name="options", tooltip="For Train AC-LoRA, or for another options node.")],
    )


def check_settings(**settings: Any) -> bool | str:
    """True, or a sentence for what no training could be made with. None stands for a linked input, not known yet."""
    try:
        TrainConfig(**{name: value for name, value in settings.items() if value is not None})
    except ValueError as error:
        return str(error)
    return True


def settings_node(options: Options | None, settings: Mapping[str, Any]) -> io.NodeOutput:
    """What a node gives that only changes settings of TrainConfig."""
    return io.NodeOutput((options or Options()).with_settings(settings))
