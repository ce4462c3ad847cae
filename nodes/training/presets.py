"""The preset of a training: it sets what the user has left at its default."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ...aclora_core.config import Preset, TrainConfig, preset_settings

log = logging.getLogger("aclora")


def with_preset(
    settings: Mapping[str, Any], preset: Preset, images: int, model_class: str
) -> tuple[dict[str, Any], str]:
    """Return the settings with those of a preset, and a sentence about it.

    Args:
        settings: fields of TrainConfig, by name; one that differs from its default was chosen by the user and stays.
        preset: one of the presets.
        images: of the style, each once.
        model_class: ComfyUI's class of the model.

    Returns:
        The settings; and "" or the sentence, which begins with a space.
    """
    found = preset_settings(preset, images, model_class)
    applied = {name: value for name, value in found.items() if _is_default(name, settings)}
    if not found:
        return dict(settings), ""
    chosen = {**settings, **applied}
    rate = chosen.get("learning_rate", TrainConfig.learning_rate)
    remark = f'Preset "{preset}": at most {chosen["steps"]} steps, learning rate {rate:g}.'
    log.info("AC-LoRA: %s", remark)
    return chosen, f" {remark}"


def _is_default(name: str, settings: Mapping[str, Any]) -> bool:
    default = getattr(TrainConfig, name)
    return bool(settings.get(name, default) == default)
