"""The registry of optimizers.

To add an optimizer: a row in OPTIMIZERS, its name in OptimizerName (config/choices.py), a line in the tooltip of the
learning options node. If it cannot work with some settings, TrainConfig refuses them (config/train_config.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import OptimizerName

# (parameters, lr, weight_decay, on_device) -> optimizer
_Make = Callable[[list[nn.Parameter], float | Tensor, float, bool], Optimizer]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer: its constructor and the properties in which it differs from others."""

    make: _Make
    package: str | None = None  # the Python package that it needs beside torch
    on_device: bool = False  # obeys found_inf and grad_scale as tensors, so a CUDA graph can capture its step
    has_fused_kernel: bool = False  # the adamw kernel computes the same update
    per_factor: bool = False  # needs every factor as a matrix of its own, not all as one flat parameter
    averages_weights: bool = False  # train() and eval() swap between training weights and their average
    lazy_states: tuple[str, ...] = ()  # states of the weights' size that only its first unskipped step would create
    weight_like_states: tuple[str, ...] = ()  # states that are weights: reset to the current weights, not to zero


def _adamw(parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float, on_device: bool) -> Optimizer:
    capturable = on_device and parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=on_device, capturable=capturable)


def _adafactor(parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float, on_device: bool) -> Optimizer:
    # With eps[1] = 1 steps are not scaled by a factor's own size: lora_up starts at 0 and would hardly move. So the
    # learning rate means the same as for AdamW.
    return torch.optim.Adafactor(parameters, lr=lr, weight_decay=weight_decay, eps=(None, 1.0), foreach=True)


def _sgd(parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float, on_device: bool) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=on_device)


def _prodigy(parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float, on_device: bool) -> Optimizer:
    library: Any = importlib.import_module("prodigyopt")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
        optimizer: Optimizer = library.Prodigy(
            parameters, lr=lr, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True
        )
    return optimizer


def _adamw_schedule_free(
    parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float, on_device: bool
) -> Optimizer:
    library: Any = importlib.import_module("schedulefree")
    optimizer: Optimizer = library.AdamWScheduleFree(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer


def _adamw_8bit(parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float, on_device: bool) -> Optimizer:
    library: Any = importlib.import_module("bitsandbytes")
    optimizer: Optimizer = library.optim.AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer


OPTIMIZERS: dict[OptimizerName, OptimizerSpec] = {
    "AdamW": OptimizerSpec(_adamw, on_device=True, has_fused_kernel=True),
    "Adafactor": OptimizerSpec(_adafactor, per_factor=True),
    "SGD": OptimizerSpec(_sgd, on_device=True, lazy_states=("momentum_buffer",)),
    "Prodigy": OptimizerSpec(_prodigy, package="prodigyopt", weight_like_states=("p0",)),  # p0: the initial weights
    "AdamWScheduleFree": OptimizerSpec(  # z: the weights that are not averaged
        _adamw_schedule_free, package="schedulefree", averages_weights=True, weight_like_states=("z",)
    ),
    "AdamW8bit": OptimizerSpec(_adamw_8bit, package="bitsandbytes"),
}


def check_installed(name: OptimizerName) -> None:
    """Check that the package of an optimizer is installed.

    Raises:
        ModuleNotFoundError: it is not; the message says how to install it.
    """
    package = OPTIMIZERS[name].package
    if package and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"The optimizer {name} needs the package {package}, which is not installed. Install it into ComfyUI's "
            f"Python (python -m pip install {package}) and restart ComfyUI, or choose AdamW."
        )
