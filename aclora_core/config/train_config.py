"""The settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from ..method import Measure, Mode
from .choices import Checkpointing, LayerPreset, LossWeighting, RestartMode, Schedule, Threshold, Timesteps
from .choices import OptimizerName as Optimizer
from .layer_patterns import parse_ranks, pattern_lines, pattern_matcher


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training. Raises ValueError for a value out of its range."""

    steps: int = 600  # optimisation steps, at most
    learning_rate: float = 5e-4  # of the optimizer
    batch_size: int = 4  # pictures in a step
    max_rank: int = 16  # generous upper bound; the signal is found inside it
    alpha: float = 8.0  # strength of the branches: scale = alpha / rank, so the learning speed does not follow the rank
    seed: int = 0  # start of the adapter, order of the pictures, noise and timesteps
    layers: LayerPreset = "attention and feed-forward"
    mode: RestartMode = "paper"  # how noise is redrawn; "off" trains a plain LoRA
    measure: Measure = "energy"  # what the threshold is a share of
    restart_every: int = 10  # epochs (E of the paper)
    threshold: Threshold = "noise floor"  # or from the loss, "dynamic" (AC-LoRA Eq. 5 and 6), or the same always
    fixed_threshold: float = 0.95  # of threshold "fixed"
    lowest_threshold: float = 0.0  # the dynamic threshold is kept between these two
    highest_threshold: float = 1.0
    clear_moments: bool = True  # forget the optimizer's moments of redrawn factors
    weight_decay: float = 0.01
    max_norm: float = 1.0  # gradients are scaled down to this norm
    held_out: float = 0.2  # share of the pictures to measure by, from eight pictures on; 0 trains on all of them
    stop_early: bool = True  # once the best step is passed for good
    refit: bool = True  # afterwards train on all pictures, the held-out ones too, up to the best step
    smallest: bool = True  # give the smallest cut of the adapter that is within the noise of the best
    checkpointing: Checkpointing = "automatic"  # whether blocks are computed twice, to need less memory
    graph: bool = True  # record steps as CUDA graphs where that is possible
    optimizer: Optimizer = "AdamW"  # the last three come from libraries of their own
    schedule: Schedule = "constant"  # of the learning rate, over the steps
    warm_up: int = 0  # steps in which the learning rate grows to its value
    accumulate: int = 1  # batches that one step learns from
    ema_decay: float = 0.0  # of the running average of the adapter that is given instead of the last step; 0 for none
    timesteps: Timesteps = "automatic"  # how noise levels are drawn; automatic goes by the model
    loss_weight: LossWeighting = "none"  # of noise levels against each other, in what is learned
    min_snr_gamma: float = 5.0  # of the loss weight min-SNR: the largest signal-to-noise ratio that counts in full
    include_layers: str = ""  # patterns, one a line: of the layers only those with one of them in their name
    exclude_layers: str = ""  # and none with one of these
    layer_ranks: str = ""  # lines of pattern=rank: the maximum rank of layers that get another
    text_learning: float = 0.0  # how fast text encoders learn, compared with the model; 0 leaves them as they are

    mask_floor: float = 0.0  # what the black of a picture's mask counts; 0 nothing, 1 as much as the white

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_rank", "restart_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, but is {getattr(self, name)}.")
        for name in ("learning_rate", "alpha", "max_norm", "min_snr_gamma"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be above 0, but is {getattr(self, name)}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be 0 or more, but is {self.weight_decay}.")
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(f"held_out must be 0 (none) to 0.5 (half of the pictures), but is {self.held_out}.")
        if not 0 <= self.mask_floor <= 1:
            raise ValueError(f"mask_floor must be 0 (black counts nothing) to 1 (as white), but is {self.mask_floor}.")
        if not 0 < self.fixed_threshold <= 1:
            raise ValueError(f"fixed_threshold must be above 0 and at most 1, but is {self.fixed_threshold}.")
        if not 0 <= self.lowest_threshold <= self.highest_threshold <= 1:
            raise ValueError(
                f"The threshold's range must lie in 0 to 1, lowest first, but is {self.lowest_threshold} to "
                f"{self.highest_threshold}."
            )
        if self.mode not in (*get_args(Mode), "off"):
            raise ValueError(f"The restart mode must be {', '.join(get_args(Mode))} or off, but is '{self.mode}'.")
        choices = {
            "measure": Measure,
            "threshold": Threshold,
            "layers": LayerPreset,
            "checkpointing": Checkpointing,
            "optimizer": Optimizer,
            "schedule": Schedule,
            "timesteps": Timesteps,
            "loss_weight": LossWeighting,
        }
        for name, kinds in ((name, get_args(choice)) for name, choice in choices.items()):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be {' or '.join(kinds)}, but is '{getattr(self, name)}'.")
        self._check_learning()

    def _check_learning(self) -> None:
        if not 0 <= self.text_learning <= 10:
            raise ValueError(f"text_learning must be 0 (no text encoder) to 10, but is {self.text_learning}.")
        if not (self.warm_up == 0 or 0 < self.warm_up < self.steps):
            raise ValueError(f"warm_up must be 0 or more and fewer than the {self.steps} steps, but is {self.warm_up}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be 0 (no average) or more and below 1, but is {self.ema_decay}.")
        if self.optimizer == "AdamWScheduleFree" and (self.schedule != "constant" or self.ema_decay):
            raise ValueError(
                "AdamWScheduleFree averages the weights in place of a schedule. Set schedule to constant and ema_decay "
                f"to 0; they are {self.schedule} and {self.ema_decay}."
            )
        if self.optimizer == "Prodigy" and self.learning_rate < 0.01:
            raise ValueError(
                "Prodigy finds the learning rate by itself, and learning_rate is a factor of what it finds. It is "
                f"{self.learning_rate}; set it to 1, or at least to 0.01."
            )
        ranked = [pattern for pattern, _ in parse_ranks(self.layer_ranks)]
        for pattern in [*pattern_lines(self.include_layers), *pattern_lines(self.exclude_layers), *ranked]:
            pattern_matcher(pattern)
