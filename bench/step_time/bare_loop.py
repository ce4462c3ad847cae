"""A bare PyTorch training loop over ComfyUI's modules: LoRA in forward hooks and AdamW. Also counts FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from bench.step_time.clock import Clock, release
from bench.step_time.models import Case, build_model, random_dataset

_RANK, _SCALE = 16, 0.5
_BLOCKS = "BasicTransformerBlock", "DoubleStreamBlock", "SingleStreamBlock"


def training(case: Case, batch: int, compiled: bool = False) -> Callable[[Clock], None]:
    """Return a function that trains without gradient checkpointing: eagerly, or with blocks that torch.compile made."""

    def run(clock: Clock) -> None:
        with _opened(case) as (base, device):
            data = _Data(base, case, device)
            with _adapted(base.diffusion_model) as factors, _compiled(base.diffusion_model, compiled):
                optimizer = torch.optim.AdamW(factors, lr=5e-4, fused=True)
                clock.start()
                while True:
                    loss = data.loss(batch)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    clock.tick(loss.item())

    return run


def counted_flops(case: Case) -> int:
    """Count the FLOPs of a forward and backward pass of one image with every layer adapted; linear in the batch."""
    with _opened(case) as (base, device):
        data = _Data(base, case, device)
        with _adapted(base.diffusion_model), FlopCounterMode(display=False) as counter:
            data.loss(1).backward()
        total = counter.get_total_flops()
    del base, data
    release()
    return total


@contextmanager
def _opened(case: Case) -> Iterator[tuple[Any, torch.device]]:
    """Load ComfyUI's model on its device, in training."""
    import comfy.model_management

    with torch.inference_mode(False), torch.enable_grad():
        model = build_model(case, disable_dynamic=True)
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        before = comfy.model_management.in_training
        comfy.model_management.in_training = True
        try:
            with _NoInplaceAdd() if case.name == "flux" else nullcontext():
                yield model.model.requires_grad_(False), model.load_device
        finally:
            comfy.model_management.in_training = before


class _NoInplaceAdd(TorchFunctionMode):
    """Compute x += y as x = x + y: Flux's blocks overwrite tensors that the backward pass of their norms needs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (Tensor.add if func is Tensor.add_ else func)(*args, **(kwargs or {}))


class _Data:
    """Latents and captions on the device."""

    def __init__(self, base: Any, case: Case, device: torch.device) -> None:
        latents, captions = random_dataset(case)
        self.base, self.device = base, device
        self.latents = torch.cat([base.process_latent_in(latent["samples"]) for latent in latents]).to(device)
        texts = torch.cat([caption[0][0] for caption in captions]).to(device)
        pooled = torch.cat([caption[0][1]["pooled_output"] for caption in captions]).to(device) if case.pooled else None
        conditions = base.extra_conds(
            cross_attn=texts, pooled_output=pooled, noise=self.latents, device=device, latent_image=self.latents
        )
        count = len(self.latents)
        self.conditions = {name: c.process_cond(batch_size=count, area=None).cond for name, c in conditions.items()}

    def loss(self, batch: int) -> Tensor:
        """Return the mean squared error of the denoised latents of a random batch."""
        chosen = torch.randperm(len(self.latents))[:batch]
        clean = self.latents[chosen]
        sampling = self.base.model_sampling
        fractions = torch.rand(batch).clamp(1e-3, 1 - 1e-3).tolist()
        sigma = torch.tensor([float(sampling.percent_to_sigma(fraction)) for fraction in fractions]).to(self.device)
        noisy = sampling.noise_scaling(sigma, torch.randn_like(clean), clean)
        conditions = {name: value[chosen] for name, value in self.conditions.items()}
        options = {"cond_or_uncond": [0] * batch, "sigmas": sigma}
        return F.mse_loss(self.base.apply_model(noisy, sigma, transformer_options=options, **conditions), clean)


@contextmanager
def _adapted(network: nn.Module) -> Iterator[list[Tensor]]:
    """Add a LoRA branch to every Linear and convolution; yields the trainable factors."""
    handles, layers = [], [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        outputs, *inputs = layer.weight.shape
        rank = min(_RANK, outputs, math.prod(inputs))
        down = torch.randn(rank, *inputs, device=layer.weight.device) / math.sqrt(math.prod(inputs))
        up = torch.zeros(outputs, rank, *(1 for _ in inputs[1:]), device=layer.weight.device)
        # As parameters of the layer and in one function for all, so that equal blocks are compiled once.
        layer.register_parameter("bench_down", nn.Parameter(down))
        layer.register_parameter("bench_up", nn.Parameter(up))
        handles.append(layer.register_forward_hook(_add_branch))
    try:
        yield [factor for layer in layers for factor in (layer.bench_down, layer.bench_up)]
    finally:
        for handle, layer in zip(handles, layers, strict=True):
            handle.remove()
            del layer.bench_down, layer.bench_up


def _add_branch(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    first, second = layer.bench_down.to(output.dtype), layer.bench_up.to(output.dtype)
    if first.ndim == 2:
        return output + _SCALE * F.linear(F.linear(inputs[0], first), second)
    x_down = F.conv2d(inputs[0], first, None, layer.stride, layer.padding, layer.dilation)
    return output + _SCALE * F.conv2d(x_down, second)


@contextmanager
def _compiled(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Compile the forward of every block of a transformer with torch.compile."""
    blocks = [block for block in network.modules() if type(block).__name__ in _BLOCKS and wanted]
    for block in blocks:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
