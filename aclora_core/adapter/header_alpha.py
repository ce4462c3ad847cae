"""Alphas that stand in a LoRA file's header, for layers without an alpha tensor."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Where diffusers (from 0.35 on) and SimpleTuner store PEFT's settings, as "<component>.<setting>".
PEFT_SETTINGS = "lora_adapter_metadata"

# One alpha for all layers. Kohya's counts for kohya's spelling of the keys only: programs that convert such a file to
# another spelling multiply the matrices by the scale, and keep the header.
_KOHYA_ALPHAS = ("ss_network_alpha", "network_alpha")
_ANY_ALPHA = "lora_alpha"

_TEXT_ENCODER = re.compile(r"(?:lora_)?(?:text_encoders?|te)_?(\d*)[._]")
_PREFIX = re.compile(r"(?:base_model\.model|diffusion_model|transformer|unet|text_encoder(?:_\d+)?)\.")


@dataclass(frozen=True)
class HeaderAlphas:
    """What a header says about the alphas of layers that have no alpha tensor."""

    peft: dict[str, dict[str, Any]] = field(default_factory=dict)  # component -> PEFT's settings
    alpha: float | None = None  # of all layers
    kohya_alpha: float | None = None  # of all layers in kohya's spelling

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> HeaderAlphas:
        """Read a header; what is no number or no JSON is passed over."""
        kohya = [_number(metadata.get(key)) for key in _KOHYA_ALPHAS]
        return cls(_peft_settings(metadata), _number(metadata.get(_ANY_ALPHA)), next(filter(None, kohya), None))

    def of_layer(self, base: str, rank: int, in_kohya_spelling: bool) -> float | None:
        """Return the alpha of a layer, such that alpha / rank is its scale; None if the header has none.

        Args:
            base: the layer's name, with its prefix.
            rank: of its matrices, at least 1.
            in_kohya_spelling: whether its keys are lora_up and lora_down.
        """
        settings = self.peft.get(_component(base, self.peft), {})
        alpha = _peft_alpha(settings, _PREFIX.sub("", base, count=1))
        if alpha is None:
            return self.alpha if self.alpha or not in_kohya_spelling else self.kohya_alpha
        # Rank-stabilised LoRA (arXiv 2312.03732) scales by alpha / √rank.
        return alpha * math.sqrt(rank) if settings.get("use_rslora") is True else alpha

    def unused_alpha(self, rank: int, in_kohya_spelling: bool) -> float | None:
        """Return kohya's alpha where it does not count for a layer and would change its scale, else None."""
        counts = in_kohya_spelling or self.peft or self.alpha
        return None if counts or self.kohya_alpha == rank else self.kohya_alpha


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    try:
        stored = json.loads(metadata.get(PEFT_SETTINGS, "{}"))
    except (ValueError, RecursionError):
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in stored.items() if isinstance(stored, dict) else ():
        component, _, name = key.rpartition(".")
        settings.setdefault(component, {})[name] = value
    return settings


def _component(base: str, settings: Mapping[str, object]) -> str:
    """Return the component of the header that a layer belongs to: a text encoder, or the diffusion model."""
    if found := _TEXT_ENCODER.match(base):
        return "text_encoder" if found[1] in ("", "1") else f"text_encoder_{found[1]}"
    # The diffusion model is "transformer" or "unet" there, whatever its keys begin with.
    return next((name for name in settings if not name.startswith("text_encoder")), "")


def _peft_alpha(settings: Mapping[str, Any], name: str) -> float | None:
    """Return PEFT's alpha of a layer: of the first pattern that its name ends in, else the one of all layers."""
    patterns = settings.get("alpha_pattern")
    for pattern, alpha in patterns.items() if isinstance(patterns, dict) else ():
        if _ends_in(name, pattern):
            return _number(alpha)
    return _number(settings.get("lora_alpha"))


def _ends_in(name: str, pattern: str) -> bool:
    compiled = _compiled(pattern)
    return compiled is not None and compiled.fullmatch(name) is not None


@functools.lru_cache(4096)  # a file may have one for each layer, and Python's own cache holds 512
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except re.error:
        return None


def _number(value: object) -> float | None:
    """Return a positive, finite number, or None. Kohya's 0 stands for the rank, which is the scale without an alpha."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None
