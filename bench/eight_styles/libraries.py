"""Train what libraries offer on the same layers, images, noise and steps as our own training.

Only the adapter differs: its start, its arithmetic and what its library does after a step. The optimizer is that of our
defaults (AdamW with weight decay, gradients clipped to a norm), and one learning rate and one alpha serve all methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor, nn

from aclora_core.acceleration import CudaGraphRunner
from aclora_core.config import TrainConfig
from aclora_core.diffusion import DiffusionModel, TrainingSet, denoising_losses, weighted_loss
from aclora_core.lora import LoraSpec, make_parameters
from aclora_core.training.batches import BatchStream, StepBatches

from . import library_adapters
from .library_adapters import Adapter, Request
from .t_lora import t_lora

_MAKE: Mapping[str, Callable[[Request], Adapter]] = {
    "peft LoRA": library_adapters.peft_lora,
    "rsLoRA": library_adapters.rs_lora,
    "DoRA": library_adapters.dora,
    "AdaLoRA": library_adapters.ada_lora,
    "LoHa": library_adapters.loha,
    "LoKr": library_adapters.lokr,
    "T-LoRA": t_lora,
}
METHODS: tuple[str, ...] = tuple(_MAKE)


@dataclass(frozen=True)
class LibraryResult:
    """What a training cost."""

    parameters: int  # numbers that were trained
    bytes: int  # of the adapter's file in float16
    seconds: float  # for all steps, without what on_mark took


def train_library(
    method: str,
    network: DiffusionModel,
    images: TrainingSet,
    layers: dict[str, nn.Module],
    indices: Sequence[int],
    *,
    steps: int,
    rank: int,
    alpha: float,
    learning_rate: float,
    batch_size: int,
    seed: int,
    marks: Sequence[int],
    on_mark: Callable[[int], None],
) -> LibraryResult:
    """Train an adapter of a library, and leave the network as it was.

    Args:
        method: one of METHODS.
        network: the frozen model.
        images: the training set.
        layers: the layers to adapt by their full name, as preset_layers(network.network, "all", network.prefix) gives
            them; with them, images, noise and noise levels are those of our training with the same rank and seed.
        indices: of the images to learn from.
        steps: of the optimizer.
        rank: of each layer, or what a method makes of it.
        alpha: of each layer, or what a method makes of it.
        learning_rate: of AdamW, for all steps.
        batch_size: images per step.
        seed: of the adapter's start, and of everything that is drawn for the steps.
        marks: steps, from 1, after which on_mark is called.
        on_mark: called with the step; meanwhile network.denoise draws with the adapter, without gradients.

    Raises:
        ValueError: the method is unknown, there are no layers, or a number is out of its range.
        ModuleNotFoundError: a library is not installed.
        FloatingPointError: the weights are not finite at the end.
    """
    _check(method, network, layers, steps, marks)
    config = TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_rank=rank,
        alpha=alpha,
        seed=seed,
        timesteps="logit-normal",
    )
    generator = torch.Generator().manual_seed(seed)
    # Ours draws its start first, so what is drawn for the steps depends on it.
    ours = make_parameters(layers, LoraSpec(rank, alpha), generator, torch.device("cpu")).layers
    initial = {name: (layer.lora_down, layer.lora_up) for name, layer in ours.items()}
    stream = BatchStream(network, images, config, indices, generator)
    eager = mock.patch.dict("os.environ", LYCORIS_KERNEL_BACKEND="torch")  # else LyCORIS compiles and times kernels
    with torch.inference_mode(False), torch.enable_grad(), unchanged(network), eager:
        with _seeded(seed, network.device):
            adapter = _MAKE[method](Request(network, layers, rank, alpha, steps, initial))
        seconds = _run(adapter, network, stream, config, set(marks), on_mark)
        return LibraryResult(
            sum(parameter.numel() for parameter in adapter.parameters.values()), _file_size(adapter), seconds
        )


def _check(
    method: str, network: DiffusionModel, layers: Mapping[str, nn.Module], steps: int, marks: Sequence[int]
) -> None:
    if method not in METHODS:
        raise ValueError(f"The method must be one of {', '.join(METHODS)}, but is '{method}'.")
    if not layers:
        raise ValueError("There are no layers to adapt.")
    if others := [mark for mark in marks if not 1 <= mark <= steps]:
        raise ValueError(f"marks must be steps of 1 to {steps}, but {others[0]} is among them.")


@contextmanager
def unchanged(network: DiffusionModel) -> Iterator[None]:
    """Freeze a model's network, and restore the model, the network and the network's modules on exit.

    Libraries replace modules and forward methods, and add attributes and hooks. None of the methods changes the values
    of the network's weights.
    """
    owners: list[Any] = [network, *network.network.modules()]
    attributes = [dict(vars(owner)) for owner in owners]
    # Modules, parameters and hooks lie in dictionaries that are attributes themselves.
    contents = [(value, dict(value)) for own in attributes for value in own.values() if isinstance(value, dict)]
    trained = [(parameter, parameter.requires_grad) for parameter in network.network.parameters()]
    try:
        network.network.requires_grad_(False)
        yield
    finally:
        for owner, own in zip(owners, attributes, strict=True):
            _refill(vars(owner), own)
        for dictionary, content in contents:
            _refill(dictionary, content)
        for parameter, was_trained in trained:
            parameter.requires_grad_(was_trained)


def _refill(dictionary: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    dictionary.clear()
    dictionary.update(content)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, which libraries draw from, and restore them on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _run(
    adapter: Adapter,
    network: DiffusionModel,
    stream: BatchStream,
    config: TrainConfig,
    marks: set[int],
    on_mark: Callable[[int], None],
) -> float:
    """Take all steps, and return the seconds that they took."""
    optimizer = _Optimizer(adapter, network, config)
    backward = _BackwardPass(adapter, network, optimizer)
    seconds, began = 0.0, _now(network.device)
    for step in range(1, config.steps + 1):
        backward(stream.next_step())
        optimizer.step()
        adapter.after_step(step)
        optimizer.clear()
        stream.prefetch()  # while the GPU works
        if step in marks:
            seconds += _now(network.device) - began
            with _evaluating(adapter):
                on_mark(step)
            began = _now(network.device)
    if not all(parameter.isfinite().all() for parameter in adapter.parameters.values()):
        raise FloatingPointError("The adapter's weights are not finite any more. Lower the learning rate.")
    return seconds + _now(network.device) - began


class _BackwardPass:
    """Adds up the gradients of a step, on a GPU by CUDA graphs, since libraries launch many small kernels."""

    def __init__(self, adapter: Adapter, network: DiffusionModel, optimizer: _Optimizer) -> None:
        self._adapter, self._network, self._optimizer = adapter, network, optimizer
        self._graphs = CudaGraphRunner(network.device)

    def __call__(self, step: StepBatches) -> None:
        gradients = self._optimizer.gradients
        if self._adapter.regularisation is not None:
            self._graphs.call(self._regularise, (), mutated=gradients)
        for batch in step.batches:
            self._graphs.call(self._denoise, batch, batch.key, mutated=gradients)

    def _regularise(self, nothing: Any) -> Tensor:
        assert self._adapter.regularisation is not None
        return self._optimizer.backward(self._adapter.regularisation())

    def _denoise(self, batch: Any) -> Tensor:
        return self._optimizer.backward(weighted_loss(denoising_losses(self._network, batch), batch)[0])


class _Optimizer:
    """AdamW as in our defaults; like ours it never makes the CPU wait for a GPU.

    The loss of a float16 network is scaled. A step whose gradient overflows is skipped, where ours repeats it.
    """

    def __init__(self, adapter: Adapter, network: DiffusionModel, config: TrainConfig) -> None:
        self._parameters = list(adapter.parameters.values())
        self._max_norm = config.max_norm
        device = network.device.type
        self._adamw = torch.optim.AdamW(
            self._parameters, config.learning_rate, weight_decay=config.weight_decay, fused=device == "cuda"
        )
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)  # a CUDA graph adds to fixed addresses
        in_float16 = network.dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device, growth_interval=200, enabled=in_float16)

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that `backward` adds to."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def backward(self, loss: Tensor) -> Tensor:
        """Add the gradient of a loss, and return the loss without it."""
        self._scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> None:
        """Clip the gradient and update the weights; the gradient stays."""
        self._scaler.unscale_(self._adamw)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._scaler.step(self._adamw)
        self._scaler.update()

    def clear(self) -> None:
        """Set the gradient to zero."""
        self._adamw.zero_grad(set_to_none=False)


@contextmanager
def _evaluating(adapter: Adapter) -> Iterator[None]:
    for module in adapter.modules:
        module.eval()
    with torch.no_grad():
        yield
    for module in adapter.modules:
        module.train()


def _now(device: torch.device) -> float:
    """Return the seconds of a clock once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _file_size(adapter: Adapter) -> int:
    tensors: dict[str, Tensor] = {
        name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in adapter.tensors().items()
    }
    return len(safetensors.torch.save(tensors))
