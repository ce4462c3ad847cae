"""The optimizers by name, each over all factors of an adapter.

Those that work on every number by itself get all factors as one tensor; Adafactor, which keeps sums over rows and
columns, gets them one by one. AdamW and SGD decide on the device whether a step counts, so a CUDA graph can hold their
step; the others compute on the processor in between and are run as they are, after the graph of the gradient.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import Kernel
from ..config import OptimizerName
from ..lora import FlatParameters

_PACKAGES = {"Prodigy": "prodigyopt", "AdamWScheduleFree": "schedulefree", "AdamW8bit": "bitsandbytes"}


_MOMENTUM = 0.9  # of SGD


_OF_WEIGHTS = ("p0", "z")  # states that are weights: the start of Prodigy, the fast weights of schedule-free


def check_installed(name: OptimizerName) -> None:
    """Raises ModuleNotFoundError, with what to install, where the library of an optimizer is missing."""
    package = _PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"The optimizer {name} needs the package {package}, which is not installed. Install it into ComfyUI's "
            f"Python (python -m pip install {package}) and restart ComfyUI, or choose AdamW."
        )


def _make(
    name: OptimizerName, parameters: list[nn.Parameter], rate: float | Tensor, decay: float, on_device: bool
) -> torch.optim.Optimizer:
    capturable = on_device and parameters[0].device.type == "cuda"
    if name == "AdamW":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=on_device, capturable=capturable)
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=rate, momentum=_MOMENTUM, weight_decay=decay, fused=on_device)
    if name == "Adafactor":
        # Steps are not scaled by a factor's own size (eps[1] of 1 is above it): lora_up begins at 0 and would hardly
        # move. So the learning rate means the same as AdamW's.
        return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay, eps=(None, 1.0), foreach=True)
    library: Any = importlib.import_module(_PACKAGES[name])
    if name == "AdamWScheduleFree":
        return library.AdamWScheduleFree(parameters, lr=rate, weight_decay=decay)
    if name == "AdamW8bit":
        return library.optim.AdamW8bit(parameters, lr=rate, weight_decay=decay)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is AdamW's
        return library.Prodigy(parameters, lr=rate, weight_decay=decay, use_bias_correction=True, safeguard_warmup=True)


class FlatOptimizer:
    """Changes the adapter's float32 weights by a gradient of all of them.

    on_device: whether step obeys left_out and divisor on the device, so that nothing waits for the GPU.
    """

    def __init__(
        self, name: OptimizerName, weights: FlatParameters, gradient: Tensor, rate: float, decay: float
    ) -> None:
        device = weights.master.device
        self.name, self._weights, self._gradient = name, weights, gradient
        self.left_out = torch.zeros((), device=device)  # 1 where the step is not to be done
        self.divisor = torch.ones((), device=device)  # of the gradient
        self.on_device = name in ("AdamW", "SGD") and device.type in ("cpu", "cuda")
        self._parameters = _separate(weights, gradient) if name == "Adafactor" else {0: _joined(weights, gradient)}
        # A recorded graph would go on with a number that it was recorded with.
        in_graph = self.on_device and device.type == "cuda"
        start = torch.full((), rate, device=device) if in_graph else rate
        self.optimizer = _make(name, list(self._parameters.values()), start, decay, self.on_device)
        self._rate = rate
        if self.on_device:
            self._make_state()
        if name == "AdamWScheduleFree":
            self.optimizer.train()  # type: ignore[attr-defined]

    def _make_state(self) -> None:
        """Makes the state by a step that the optimizer is told to leave out: a graph could not make it."""
        if self.name == "SGD":  # which would make its own only in a step that counts
            self.optimizer.state[self._parameters[0]]["momentum_buffer"] = torch.zeros_like(self._weights.master)
        self.optimizer.found_inf = self.left_out  # type: ignore[attr-defined]
        self.optimizer.grad_scale = self.divisor  # type: ignore[attr-defined]
        self.left_out.fill_(1)
        self.optimizer.step()

    def step(self) -> None:
        """One step with gradient / divisor, or none where left_out is 1. The gradient may be overwritten."""
        if self.on_device:
            self.optimizer.step()
        elif not self.left_out:
            self._gradient /= self.divisor
            self.optimizer.step()

    def step_at_once(self, adamw: Kernel[..., ..., None], gradient: Tensor, before: Tensor) -> None:
        """step of AdamW by a kernel, which also clears the gradient, and brings the model's copy up to date.

        before: gets the weights as they were, where the step is done.
        """
        moments, (group,) = self._moments(0), self.optimizer.param_groups
        moments["step"] += 1 - self.left_out
        adamw(
            self._weights.master,
            gradient,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            before,
            self._weights.compute,
            moments["step"],
            group["lr"],
            self.divisor,
            self.left_out,
            group["betas"],
            group["weight_decay"],
            group["eps"],
        )

    @property
    def rate(self) -> float:
        """The learning rate of the last step; of Prodigy the one that it has found."""
        return self._rate * float(self.optimizer.param_groups[0].get("d", 1.0))

    @rate.setter
    def rate(self, value: float) -> None:
        if value == self._rate:
            return
        self._rate = value
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    @torch.no_grad()
    def forget(self, spans: Iterable[slice]) -> None:
        """Clears what the optimizer knows of weights that others have changed: it speaks of weights that are gone."""
        spans = list(spans)
        if self.name == "Adafactor":
            for span in spans:
                self.optimizer.state.pop(self._parameters[span.start], None)
            return
        for key, tensor in self._moments(0).items():
            if not (isinstance(tensor, Tensor) and tensor.numel() == self._gradient.numel() and spans):
                continue
            parts = [tensor[span] for span in spans]
            if key in _OF_WEIGHTS:
                torch._foreach_copy_(parts, [self._weights.master[span] for span in spans])
            elif zero := self._zero_of(key, tensor):
                for part in parts:
                    part.fill_(zero)
            else:  # all layers in a few launches: 800 of them would cost a GPU as much as the restart itself
                torch._foreach_zero_(parts)

    def _zero_of(self, key: str, tensor: Tensor) -> int:
        """0, or the number that stands for it in a state of eight bits."""
        return int(self._moments(0)[key.replace("state", "qmap")].abs().argmin()) if tensor.dtype == torch.uint8 else 0

    def show(self) -> None:
        """Puts the weights that are to be given in place of those that training goes on from, if they are others."""
        if self.name == "AdamWScheduleFree":
            self.optimizer.eval()  # type: ignore[attr-defined]

    def hide(self) -> None:
        """After show: lets training go on. The weights are to be put back by the caller, bit for bit."""
        if self.name == "AdamWScheduleFree":
            self.optimizer.train()  # type: ignore[attr-defined]

    @property
    def shows_others(self) -> bool:
        """Whether show changes the weights."""
        return self.name == "AdamWScheduleFree"

    def tensors(self) -> list[Tensor]:
        """What step changes besides the weights and the gradient, where it can be recorded."""
        return [value for value in self._moments(0).values() if isinstance(value, Tensor)] if self.on_device else []

    def _moments(self, start: int) -> dict[str, Any]:
        return self.optimizer.state[self._parameters[start]]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: of the optimizer itself, and of each parameter, by where it begins."""
        (group,) = self.optimizer.param_groups
        return {
            "group": {key: value for key, value in group.items() if isinstance(value, Tensor | int | float)},
            "moments": {str(start): dict(self.optimizer.state.get(p, {})) for start, p in self._parameters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one stood. Tensors are filled in place: recorded graphs know their addresses."""
        (group,) = self.optimizer.param_groups
        _fill(group, state["group"], self._gradient.device)
        self._rate = float(group["lr"])
        for start, moments in state["moments"].items():
            parameter = self._parameters[int(start)]
            if not moments:
                self.optimizer.state.pop(parameter, None)
            else:
                _fill(self.optimizer.state[parameter], moments, parameter.device)


def _fill(own: dict[str, Any], given: Mapping[str, Any], device: torch.device) -> None:
    for key, value in given.items():
        if isinstance(own.get(key), Tensor):
            own[key].copy_(torch.as_tensor(value))
        elif isinstance(value, Tensor):  # counters, of no dimension, are kept on the processor
            own[key] = value.to(device if value.ndim else "cpu", copy=True)
        else:
            own[key] = value


def _joined(weights: FlatParameters, gradient: Tensor) -> nn.Parameter:
    """All factors as one parameter that shares the weights' memory, and its gradient."""
    parameter = nn.Parameter(weights.master)
    parameter.grad = gradient
    return parameter


def _separate(weights: FlatParameters, gradient: Tensor) -> dict[int, nn.Parameter]:
    """Each factor as a matrix, by where it begins; it and its gradient share the memory of the whole."""
    parameters = {}
    for branch in weights.layers.values():
        for factor in (branch.lora_down, branch.lora_up):
            span = weights.span(factor)
            parameters[span.start] = parameter = nn.Parameter(weights.master[span].view(len(factor), -1))
            parameter.grad = gradient[span].view(len(factor), -1)
    return parameters
