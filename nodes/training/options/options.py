"""Options that are passed along a chain of options nodes, and the parts that these nodes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ....aclora_core.config import CheckpointConfig, Preset, TrainConfig

if TYPE_CHECKING:
    from comfy.sd import CLIP, VAE

OPTIONS_TYPE = io.Custom("ACLORA_OPTIONS")


@dataclass(frozen=True)
class PreviewSettings:
    """Which preview images to draw during a training, and how often."""

    every: int  # steps
    share: float  # largest fraction of the training's time that previews may take
    prompts: Sequence[str]
    conditionings: Sequence[Any]  # ComfyUI's, of each prompt and then of the empty prompt
    guidance: float  # the sampler's cfg
    vae: VAE | None


@dataclass(frozen=True)
class Options:
    """Options that a chain of options nodes sets; missing ones keep their defaults."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainConfig, by name
    checkpoints: CheckpointConfig | None = None
    previews: PreviewSettings | None = None
    clip: CLIP | None = None  # a text encoder to train as well
    unconditional: Any = None  # ComfyUI's conditioning of the empty caption
    preset: Preset = "off"  # sets what is left at its default
    gpus: str = "1"  # how many train together: a number, or "all"

    def with_settings(self, settings: Mapping[str, Any]) -> Options:
        """Return a copy with further settings, which override those that are set already."""
        return replace(self, settings={**self.settings, **settings})


def options_schema(
    *, node_id: str, name: str, description: str, inputs: list[Any], search_aliases: list[str]
) -> io.Schema:
    """Return the schema of an options node.

    Args:
        node_id: the node's id, which saved workflows use. Give a literal: programs that list packs read the source.
        name: the display name.
        description: one or two sentences; how to connect the node is added.
        inputs: the node's own inputs; the link to another options node is added.
        search_aliases: words that users may search for.
    """
    chained = OPTIONS_TYPE.Input(
        "options",
        optional=True,
        tooltip="Another options node to combine with this one. If both change a setting, this node's value is used.",
    )
    output = OPTIONS_TYPE.Output(display_name="options", tooltip="Connect to Train AC-LoRA or to another options node.")
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category="AC-LoRA/options",
        description=f"{description} Connect it to the options of Train AC-LoRA.",
        search_aliases=search_aliases,
        inputs=[chained, *inputs],
        outputs=[output],
    )


def check_each(settings: Mapping[str, Any]) -> None:
    """Check settings of TrainConfig one by one.

    A node does so when it runs: ComfyUI repeats what `validate_inputs` says at every input that it looks at.

    Raises:
        ValueError: one is wrong; the message begins with its name.
    """
    for name, value in settings.items():
        try:
            TrainConfig(**{name: value})
        except ValueError as error:
            sentence = str(error)
            raise ValueError(sentence if sentence.startswith(name) else f"{name}: {sentence}") from error


def settings_output(options: Options | None, settings: Mapping[str, Any]) -> io.NodeOutput:
    """Return the output of a node that changes settings of TrainConfig only.

    Args:
        options: of the node before it in the chain, if any.
        settings: fields of TrainConfig, by name.
    """
    return io.NodeOutput((options or Options()).with_settings(settings))
