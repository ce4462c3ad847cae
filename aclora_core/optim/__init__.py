"""One optimizer step: gradient accumulation, the optimizer, the learning rate schedule, the EMA of the weights."""

from .gradients import Loss
from .lr_schedule import learning_rate_at
from .optimizers import OPTIMIZERS, OptimizerSpec, check_installed
from .stepper import Stepper

__all__ = [
    "Loss",
    "OPTIMIZERS",
    "OptimizerSpec",
    "Stepper",
    "check_installed",
    "learning_rate_at",
]
