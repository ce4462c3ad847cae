"""One optimizer step: gradients, the optimizer, the learning rate, the running average."""

from .lr_schedule import learning_rate_at
from .optimizers import check_installed
from .stepper import Loss, Stepper

__all__ = [
    "Loss",
    "Stepper",
    "check_installed",
    "learning_rate_at",
]
