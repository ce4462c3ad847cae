"""PEFT's settings in the header of files for diffusers."""

from __future__ import annotations

import json
import re

from .adapter import Adapter
from .header_alpha import PEFT_SETTINGS

COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2")  # of diffusers' pipelines


def peft_header(adapter: Adapter) -> dict[str, str]:
    """Return metadata that gives each layer the scale 1 in diffusers; none if all have one rank.

    Without it, diffusers 0.36 takes one alpha for all layers of a file without alphas, whatever their ranks.
    """
    if len({layer.rank for layer in adapter.layers.values()}) == 1:
        return {}
    settings: dict[str, object] = {}
    for component in COMPONENTS:
        ranks = {
            _module(base, component): layer.rank
            for base, layer in adapter.layers.items()
            if base.startswith(f"{component}.")
        }
        if ranks:
            rank = next(iter(ranks.values()))
            # In older versions of transformers the layers of text encoders are inside "text_model".
            start = "" if component.startswith("text_encoder") else "^"
            patterns = {start + re.escape(name): each for name, each in ranks.items()}
            named = {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": patterns}
            settings |= {f"{component}.{key}": value for key, value in named.items()}
            settings[f"{component}.target_modules"] = list(ranks)
    return {PEFT_SETTINGS: json.dumps(settings)} if settings else {}


def _module(base: str, component: str) -> str:
    """Return the name of a layer in diffusers' own model."""
    name = base.removeprefix(f"{component}.").removeprefix("text_model.")
    return name.replace(".processor.to_out", ".to_out.0").replace(".processor.", ".")
