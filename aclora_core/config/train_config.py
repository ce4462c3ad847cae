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
    """The settings of a training.

    Checkpoints store the fields by name, and nodes have inputs of the same names.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int = 1000  # maximum number of optimizer steps
    learning_rate: float = 5e-4
    batch_size: int = 4  # images per batch
    max_rank: int = 32  # generous upper bound; layers are truncated to the ranks that they use
    alpha: float = 8.0  # scale = alpha / rank, so that the learning speed does not depend on the rank
    seed: int = 0  # of the initial adapter, the order of the images, the noise and the timesteps
    layers: LayerPreset = "all"
    mode: RestartMode = "off"  # how restarts resample noise; "off": there are none
    measure: Measure = "energy"  # what the threshold is a fraction of
    restart_every: int = 80  # epochs (E in the paper, where it is 10)
    # "dynamic": from the loss (AC-LoRA Eq. 5 and 6); "fixed": fixed_threshold; "scheduled": rises over the training
    threshold: Threshold = "dynamic"
    fixed_threshold: float = 0.95
    lowest_threshold: float = 0.0  # bounds of the dynamic threshold; where the scheduled one starts and ends
    highest_threshold: float = 1.0
    clear_moments: bool = True  # whether restarts reset the optimizer state of resampled factors
    weight_decay: float = 0.01
    max_norm: float = 1.0  # gradient norm above which gradients are clipped
    held_out: float = 0.0  # fraction of the images held out for validation if there are eight or more; 0 for none
    stop_early: bool = True  # early stopping: once the images are fitted, or the held-out loss has stopped improving
    refit: bool = True  # afterwards train on all images, the held-out ones too, up to the best step
    smallest: bool = True  # truncate layers to the ranks they use, or to the smallest as good on held-out images
    checkpointing: Checkpointing = "automatic"  # which blocks are recomputed in the backward pass, to save memory
    graph: bool = True  # capture steps as CUDA graphs if possible
    optimizer: Optimizer = "AdamW"  # the last three come from optional packages
    schedule: Schedule = "constant"  # of the learning rate, over all steps
    warm_up: int = 0  # steps over which the learning rate rises to its value
    accumulate: int = 1  # batches per step, whose gradients are accumulated
    ema_decay: float = 0.0  # of the EMA of the adapter, which is returned instead of the last step; 0 for none
    timesteps: Timesteps = "automatic"  # how noise levels are drawn; "automatic" depends on the model
    loss_weight: LossWeighting = "none"  # of noise levels, in the training loss only
    min_snr_gamma: float = 5.0  # of min-SNR: the signal-to-noise ratio above which weights are reduced
    include_layers: str = ""  # patterns, one per line, of which a layer's name must match one
    exclude_layers: str = ""  # patterns, one per line, of which a layer's name must match none
    layer_ranks: str = ""  # lines of pattern=rank: maximum ranks that differ from max_rank
    text_learning: float = 0.0  # learning rate of text encoders relative to the model's; 0 does not train them
    mask_floor: float = 0.0  # weight of the black parts of masks, relative to the white parts
    timestep_shift: float = 1.0  # factor on the odds of noise fractions that are drawn; above 1 for more noise
    restart_steps: int = 0  # optimizer steps between restarts, in place of restart_every; 0 leaves it to that
    caption_dropout: float = 0.0  # probability that an image of a step is trained with the empty caption
    stratified_timesteps: bool = False  # whether the noise levels of a step come from equal parts of their distribution
    prior_weight: float = 0.0  # weight of prior preservation: the distance to the base's prediction without a caption
    gpu_memory: float = 0.0  # GB (of 1024³ bytes) that the whole program may use on the GPU; 0 for all there is

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_rank", "restart_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, but is {getattr(self, name)}.")
        if self.restart_steps < 0:
            raise ValueError(f"restart_steps must be 0 (restart_every counts) or more, but is {self.restart_steps}.")
        for name in ("learning_rate", "alpha", "max_norm", "min_snr_gamma", "timestep_shift"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be above 0, but is {getattr(self, name)}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be 0 or more, but is {self.weight_decay}.")
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(f"held_out must be 0 (none) to 0.5 (half of the images), but is {self.held_out}.")
        if not 0 <= self.mask_floor <= 1:
            raise ValueError(f"mask_floor must be 0 (black is ignored) to 1 (as white), but is {self.mask_floor}.")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be 0 (never) to 1 (always), but is {self.caption_dropout}.")
        if not (math.isfinite(self.prior_weight) and self.prior_weight >= 0):
            raise ValueError(f"prior_weight must be 0 (no prior preservation) or more, but is {self.prior_weight}.")
        if not (math.isfinite(self.gpu_memory) and self.gpu_memory >= 0):
            raise ValueError(f"gpu_memory must be 0 (all that is free) or more GB, but is {self.gpu_memory}.")
        if not 0 < self.fixed_threshold <= 1:
            raise ValueError(f"fixed_threshold must be above 0 and at most 1, but is {self.fixed_threshold}.")
        if not 0 <= self.lowest_threshold <= self.highest_threshold <= 1:
            raise ValueError(
                "lowest_threshold must be at most highest_threshold, and both 0 to 1, but their range is "
                f"{self.lowest_threshold} to {self.highest_threshold}. Lower lowest_threshold."
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
        for name, choice in choices.items():
            allowed = get_args(choice)
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, but is '{getattr(self, name)}'.")
        self._check_learning()

    @property
    def needs_unconditional(self) -> bool:
        """Whether the training needs the conditioning of the empty caption."""
        return self.caption_dropout > 0 or self.prior_weight > 0

    def _check_learning(self) -> None:
        if not 0 <= self.text_learning <= 10:
            raise ValueError(f"text_learning must be 0 (no text encoder) to 10, but is {self.text_learning}.")
        if not (self.warm_up == 0 or 0 < self.warm_up < self.steps):
            raise ValueError(f"warm_up must be 0 or more and fewer than the {self.steps} steps, but is {self.warm_up}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be 0 (no average) or more and below 1, but is {self.ema_decay}.")
        if self.optimizer == "AdamWScheduleFree" and (self.schedule != "constant" or self.ema_decay):
            raise ValueError(
                "AdamWScheduleFree averages the weights instead of using a schedule. Set schedule to constant and "
                f"ema_decay to 0; they are {self.schedule} and {self.ema_decay}."
            )
        if self.optimizer == "Prodigy" and self.learning_rate < 0.01:
            raise ValueError(
                "Prodigy finds the learning rate itself, and learning_rate is a factor of what it finds. It is "
                f"{self.learning_rate}; set it to 1, or at least to 0.01."
            )
        ranked = [pattern for pattern, _ in parse_ranks(self.layer_ranks)]
        for pattern in [*pattern_lines(self.include_layers), *pattern_lines(self.exclude_layers), *ranked]:
            pattern_matcher(pattern)
