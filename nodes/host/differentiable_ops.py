"""Use only differentiable ComfyUI operations during training, the fastest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import comfy.ops
import comfy.quant_ops
from comfy.ldm.aura import mmdit as aura
from comfy.ldm.flux import layers as flux_layers
from comfy.ldm.flux import math as flux
from comfy.ldm.kandinsky5 import model as kandinsky
from comfy.ldm.lumina import model as lumina
from comfy.ldm.modules.diffusionmodules import mmdit as stable_diffusion
from comfy.ldm.qwen_image import model as qwen_image
from torch import Tensor

from ...aclora_core.acceleration import MAX_KEYS, find_kernels


@contextmanager
def differentiable_operations() -> Iterator[None]:
    """Make all operations of ComfyUI's networks differentiable, and restore them on exit."""
    before = comfy.model_management.in_training
    # Some of ComfyUI's fused kernels have no backward; most networks do not use them while this flag is set.
    comfy.model_management.in_training = True
    try:
        with _eager_rope(), _fused_rope(), _fused_modulation(), _without_fp8_matmul(), _fast_attention():
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


@contextmanager
def replaced_attribute(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Set an attribute to change(its value), and restore it on exit. Do nothing if there is no such attribute.

    Args:
        owner: a module or an object.
        name: of its attribute.
        change: from the value to its replacement.
    """
    own = getattr(owner, name, None)
    try:
        if own is not None:
            setattr(owner, name, change(own))
        yield
    finally:
        if own is not None:
            setattr(owner, name, own)


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


@contextmanager
def _fused_modulation() -> Iterator[None]:
    """Use the fused modulation kernel in networks that shift, scale and gate their tokens in functions of their own."""
    qwen_block = getattr(qwen_image, "QwenImageTransformerBlock", None)
    with (
        replaced_attribute(flux_layers, "apply_mod", partial(_with_modulation, _of_flux)),  # Chroma's and Hunyuan's too
        replaced_attribute(stable_diffusion, "modulate", partial(_with_modulation, _of_stable_diffusion)),
        replaced_attribute(aura, "modulate", partial(_with_modulation, _of_stable_diffusion)),
        replaced_attribute(lumina, "modulate", partial(_with_modulation, _of_lumina)),  # and Z-Image's
        replaced_attribute(lumina, "apply_gate", partial(_with_modulation, _of_lumina_gate)),
        replaced_attribute(qwen_block, "_modulate", _qwen_modulate),
        replaced_attribute(qwen_block, "_apply_gate", partial(_with_modulation, _of_qwen_gate)),
        replaced_attribute(kandinsky, "apply_scale_shift_norm", _kandinsky_modulate),
        replaced_attribute(kandinsky, "apply_gate_sum", partial(_with_modulation, _of_kandinsky_gate)),
    ):
        yield


class _Modulation(NamedTuple):
    """x · scale + addend, or x · (1 + scale) + addend."""

    x: Tensor
    scale: Tensor
    addend: Tensor | None
    plus_one: bool = False


def _with_modulation(
    given: Callable[..., _Modulation | None], fallback: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return a function that uses the modulation kernel where it can, and ComfyUI's own elsewhere.

    Args:
        given: reads the arguments of ComfyUI's function; None if that does more than a modulation.
        fallback: ComfyUI's function.
    """

    def modulated(*args: Any, **kwargs: Any) -> Tensor:
        it = given(*args, **kwargs)
        kernels = None if it is None else find_kernels(it.x.device, it.x.dtype, "transformer")
        if it is None or kernels is None:
            return fallback(*args, **kwargs)
        factor = 1 + it.scale if it.plus_one else it.scale
        if not kernels.modulate.supports(it.x, factor, it.addend):
            return fallback(*args, **kwargs)
        return kernels.modulate(it.x, factor, it.addend)

    return modulated


def _of_flux(tensor: Tensor, m_mult: Tensor, m_add: Any = None, modulation_dims: Any = None) -> _Modulation | None:
    return _Modulation(tensor, m_mult, m_add) if modulation_dims is None else None


def _of_stable_diffusion(x: Tensor, shift: Tensor | None, scale: Tensor) -> _Modulation:
    return _Modulation(x, scale.unsqueeze(1), None if shift is None else shift.unsqueeze(1), plus_one=True)


def _of_lumina(x: Tensor, scale: Tensor, timestep_zero_index: Any = None) -> _Modulation | None:
    return _Modulation(x, scale.unsqueeze(1), None, plus_one=True) if timestep_zero_index is None else None


def _of_lumina_gate(gate: Tensor, x: Tensor, timestep_zero_index: Any = None) -> _Modulation | None:
    return _Modulation(x, gate, None) if timestep_zero_index is None else None


def _of_qwen_gate(block: Any, x: Tensor, y: Tensor, gate: Any, timestep_zero_index: Any = None) -> _Modulation | None:
    return _Modulation(x, gate, y) if timestep_zero_index is None else None


def _qwen_modulate(own: Callable[..., Any]) -> Callable[..., Any]:
    def modulated(block: Any, x: Tensor, mod_params: Tensor, timestep_zero_index: Any = None) -> Any:
        if timestep_zero_index is not None:
            return own(block, x, mod_params, timestep_zero_index)
        shift, scale, gate = mod_params.chunk(3, dim=-1)
        return stable_diffusion.modulate(x, shift, scale), gate.unsqueeze(1)  # the same as SD3's, which is replaced

    return modulated


def _kandinsky_modulate(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    modulated = _with_modulation(_of_kandinsky, partial(own, lambda normed: normed))
    return lambda norm, x, scale, shift: modulated(norm(x), scale, shift)


def _of_kandinsky(normed: Tensor, scale: Tensor, shift: Tensor) -> _Modulation:
    return _Modulation(normed, scale, shift, plus_one=True)


def _of_kandinsky_gate(x: Tensor, out: Tensor, gate: Tensor) -> _Modulation:
    return _Modulation(out, gate, x)


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
