"""Use only differentiable ComfyUI operations during training, the fastest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
from comfy.ldm.flux import math as flux
from torch import Tensor

from ...aclora_core.acceleration import MAX_KEYS, find_kernels
from .fused_modulation import fused_modulation
from .replaced import replaced_attribute


@contextmanager
def differentiable_operations() -> Iterator[None]:
    """Make all operations of ComfyUI's networks differentiable, and restore them on exit."""
    before = comfy.model_management.in_training
    # Some of ComfyUI's fused kernels have no backward; most networks do not use them while this flag is set.
    comfy.model_management.in_training = True
    try:
        with _eager_rope(), _fused_rope(), fused_modulation(), _without_fp8_matmul(), _fast_attention():
            yield
    finally:
        comfy.model_management.in_training = before


@contextmanager
def _eager_rope() -> Iterator[None]:
    """Replace the fused RoPE kernels by plain ones, for networks that use them in spite of the flag, such as Cosmos."""
    kitchen = getattr(comfy.quant_ops, "ck", None)
    plain = getattr(getattr(kitchen, "backends", None), "eager", None)
    # Those that end in _ work in place, which would overwrite tensors that the backward pass needs.
    names = [name for name in vars(plain or object) if "rope" in name and not name.endswith("_")]
    with ExitStack() as undo:
        for name in names:
            undo.enter_context(replaced_attribute(kitchen, name, partial(_eager_function, plain, name)))
        yield


def _eager_function(plain: Any, name: str, own: Any) -> Any:
    return getattr(plain, name)


def _fused_rope() -> AbstractContextManager[None]:
    """Use the fused RoPE kernel in networks that take their RoPE from Flux while in_training is set."""

    def with_kernel(fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def apply_rope(x: Tensor, table: Tensor) -> Tensor:
            kernels = find_kernels(x.device, x.dtype, "transformer")
            if kernels is None or not kernels.rope.supports(x, table):
                return fallback(x, table)
            return kernels.rope(x, table)

        return apply_rope

    return replaced_attribute(flux, "_apply_rope1", with_kernel)


def _without_fp8_matmul() -> AbstractContextManager[None]:
    """Disable ComfyUI's fp8 matmul: it has no backward, so every call would fail, log a line and fall back.

    Without it ComfyUI's layers use the fallback at once.
    """
    return replaced_attribute(comfy.ops, "fp8_linear", lambda own: lambda layer, input: None)


@contextmanager
def _fast_attention() -> Iterator[None]:
    """Prefer cuDNN's attention: on an H100 its backward pass takes half the time of ComfyUI's first choice."""
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", [])  # exists with a GPU only
    before = list(order)
    order.sort(key=lambda backend: backend.name != "CUDNN_ATTENTION")
    try:
        with replaced_attribute(comfy.ops, "scaled_dot_product_attention", _with_short_key_kernel):
            yield
    finally:
        order[:] = before


def _with_short_key_kernel(fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an attention that uses the short-key kernel for captions, and ComfyUI's own for everything else."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        special = args or kwargs.get("attn_mask") is not None
        special = special or any(kwargs.get(name) for name in kwargs.keys() - {"attn_mask", "scale"})
        special = special or k.shape[-2] > MAX_KEYS  # checked first, to compile no kernel that is not used
        kernels = None if special else find_kernels(q.device, q.dtype, "unet")
        if kernels is None or not kernels.short_key_attention.supports(q, k, v):
            return fallback(q, k, v, *args, **kwargs)
        return kernels.short_key_attention(q, k, v, kwargs.get("scale") or q.shape[-1] ** -0.5)

    return attention
