"""An optimizer of the registry, applied to all factors of an adapter at once.

Element-wise optimizers get all factors as one flat parameter; Adafactor, which keeps sums over rows and columns, gets
one parameter per factor. AdamW and SGD decide on the device whether a step counts, so a CUDA graph can capture their
step; the others wait for the GPU, and run eagerly after the captured graph of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import Kernel
from ..config import OptimizerName
from ..lora import FlatParameters
from .optimizers import OPTIMIZERS


class FlatOptimizer:
    """An optimizer over the float32 weights of an adapter, which reads one flat float32 gradient.

    Longer than most classes: each method is one question that differs between torch's optimizers and their libraries,
    and all of them need the state of the one optimizer.

    Attributes:
        skip: scalar on the device; step does nothing where it is 1.
        divisor: scalar on the device; step divides the gradient by it.
        on_device: whether step reads skip and divisor on the device, so that the CPU never waits for the GPU.
        optimizer: the torch optimizer.
    """

    def __init__(
        self,
        name: OptimizerName,
        weights: FlatParameters,
        gradient: Tensor,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        device = weights.master.device
        self.spec = OPTIMIZERS[name]
        self.skip = torch.zeros((), device=device)
        self.divisor = torch.ones((), device=device)
        self.on_device = self.spec.on_device and device.type in ("cpu", "cuda")
        self._weights = weights
        self._gradient = gradient
        self._learning_rate = learning_rate
        make_parameters = _factor_parameters if self.spec.per_factor else _flat_parameter
        self._parameters = make_parameters(weights, gradient)
        # A captured graph needs the learning rate as a tensor: it would keep using a number from its capture.
        in_graph = self.on_device and device.type == "cuda"
        lr = torch.full((), learning_rate, device=device) if in_graph else learning_rate
        self.optimizer = self.spec.make(list(self._parameters.values()), lr, weight_decay, self.on_device)
        if self.on_device:
            self._create_state()
        self.train_mode()

    def _create_state(self) -> None:
        """Create the optimizer state by a step that is skipped, as a graph cannot capture its creation."""
        for key in self.spec.lazy_states:
            self._state(0)[key] = torch.zeros_like(self._weights.master)
        self.optimizer.found_inf = self.skip  # type: ignore[attr-defined]
        self.optimizer.grad_scale = self.divisor  # type: ignore[attr-defined]
        self.skip.fill_(1)
        self.optimizer.step()

    def step(self) -> None:
        """Update the weights with gradient / divisor, unless skip is 1. May overwrite the gradient."""
        if self.on_device:
            self.optimizer.step()
        elif not self.skip:
            self._gradient /= self.divisor
            self.optimizer.step()

    def fused_step(self, adamw: Kernel[..., ..., None], gradient: Tensor, previous: Tensor) -> None:
        """Do step by the AdamW kernel, which also clears the gradient and updates the weights in the model's dtype.

        Args:
            adamw: the kernel.
            gradient: flat gradient, in float32 or in the model's dtype.
            previous: receives the weights from before the step, unless skip is 1.
        """
        state = self._state(0)
        (group,) = self.optimizer.param_groups
        state["step"] += 1 - self.skip
        adamw(
            self._weights.master,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            previous,
            self._weights.compute,
            state["step"],
            group["lr"],
            self.divisor,
            self.skip,
            group["betas"],
            group["weight_decay"],
            group["eps"],
        )

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step; for Prodigy, times the step size d that it has estimated."""
        return self._learning_rate * float(self.optimizer.param_groups[0].get("d", 1.0))

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        if value == self._learning_rate:
            return
        self._learning_rate = value
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    @torch.no_grad()
    def reset_state(self, spans: Iterable[slice]) -> None:
        """Reset the optimizer state of weights that a restart has replaced.

        Args:
            spans: of the replaced factors in the flat tensor.
        """
        spans = list(spans)
        if self.spec.per_factor:
            for span in spans:
                self.optimizer.state.pop(self._parameters[span.start], None)
            return
        state = self._state(0)
        for key, tensor in state.items():
            if not (spans and isinstance(tensor, Tensor) and tensor.numel() == self._gradient.numel()):
                continue
            parts = [tensor[span] for span in spans]
            if key in self.spec.weight_like_states:
                torch._foreach_copy_(parts, [self._weights.master[span] for span in spans])
            elif tensor.dtype == torch.uint8:
                _fill_all(parts, _zero_code(state[key.replace("state", "qmap")]))
            else:  # all layers in a few launches: one per layer would cost as much as the restart itself
                torch._foreach_zero_(parts)

    def eval_mode(self) -> None:
        """Replace the weights by the optimizer's average of them, where it keeps one."""
        if self.spec.averages_weights:
            self.optimizer.eval()  # type: ignore[attr-defined]

    def train_mode(self) -> None:
        """Undo eval_mode, up to rounding."""
        if self.spec.averages_weights:
            self.optimizer.train()  # type: ignore[attr-defined]

    def tensors(self) -> list[Tensor]:
        """Tensors that a captured step changes besides the weights and the gradient; none if steps run eagerly."""
        if not self.on_device:
            return []
        return [value for value in self._state(0).values() if isinstance(value, Tensor)]

    def _state(self, start: int) -> dict[str, Any]:
        """State of the parameter that begins at `start` in the flat tensor."""
        state: dict[str, Any] = self.optimizer.state[self._parameters[start]]
        return state

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: the parameter group's numbers, and the state by the start of each parameter."""
        (group,) = self.optimizer.param_groups
        return {
            "group": {key: value for key, value in group.items() if isinstance(value, Tensor | int | float)},
            "moments": {str(start): dict(self.optimizer.state.get(p, {})) for start, p in self._parameters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state_dict. Tensors are filled in place, as captured graphs hold their addresses."""
        (group,) = self.optimizer.param_groups
        _restore(group, state["group"], self._gradient.device)
        self._learning_rate = float(group["lr"])
        for start, saved in state["moments"].items():
            parameter = self._parameters[int(start)]
            if saved:
                _restore(self.optimizer.state[parameter], saved, parameter.device)
            else:
                self.optimizer.state.pop(parameter, None)


def _zero_code(values: Tensor) -> int:
    """The code of 0.0 in an 8-bit state, whose codes are indices into a table of values."""
    return int(values.abs().argmin())


def _fill_all(parts: list[Tensor], value: int) -> None:
    for part in parts:
        part.fill_(value)


def _restore(target: dict[str, Any], saved: Mapping[str, Any], device: torch.device) -> None:
    for key, value in saved.items():
        if isinstance(target.get(key), Tensor):
            target[key].copy_(torch.as_tensor(value))
        elif isinstance(value, Tensor):  # scalars, such as step counters, stay on the CPU
            target[key] = value.to(device if value.ndim else "cpu", copy=True)
        else:
            target[key] = value


def _flat_parameter(weights: FlatParameters, gradient: Tensor) -> dict[int, nn.Parameter]:
    """All factors as one parameter at 0. It shares the memory of the weights, and its .grad that of the gradient."""
    parameter = nn.Parameter(weights.master)
    parameter.grad = gradient
    return {0: parameter}


def _factor_parameters(weights: FlatParameters, gradient: Tensor) -> dict[int, nn.Parameter]:
    """Every factor as a matrix (rows, elements / rows), by its start in the flat tensors, whose memory it shares."""
    parameters = {}
    for layer in weights.layers.values():
        for factor in (layer.lora_down, layer.lora_up):
            span = weights.span(factor)
            parameter = nn.Parameter(weights.master[span].view(len(factor), -1))
            parameter.grad = gradient[span].view(len(factor), -1)
            parameters[span.start] = parameter
    return parameters
