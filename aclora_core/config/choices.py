"""The names that settings may take."""

from __future__ import annotations

from typing import Literal

from ..method import Mode

Timesteps = Literal["automatic", "uniform", "logit-normal", "shifted"]
LossWeighting = Literal["none", "min-SNR", "debiased"]
LayerPreset = Literal["attention", "attention and feed-forward", "all"]
OptimizerName = Literal["AdamW", "Adafactor", "SGD", "Prodigy", "AdamWScheduleFree", "AdamW8bit"]
Schedule = Literal["constant", "cosine", "linear"]
RestartMode = Literal[Mode, "off"]
Threshold = Literal["dynamic", "fixed", "noise floor", "scheduled"]
Checkpointing = Literal["automatic", "all", "off"]
