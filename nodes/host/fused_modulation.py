"""The fused modulation kernel in the place of ComfyUI's functions that shift, scale and gate tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...aclora_core.acceleration import find_kernels
from .network_modules import network_module
from .replaced import replaced_attribute

_MODULES = (  # of networks, which not every ComfyUI has
    "flux.layers",
    "modules.diffusionmodules.mmdit",
    "aura.mmdit",
    "lumina.model",
    "qwen_image.model",
    "kandinsky5.model",
)


@contextmanager
def fused_modulation() -> Iterator[None]:
    """Use the fused modulation kernel in networks that shift, scale and gate their tokens in functions of their own."""
    flux, stable_diffusion, aura, lumina, qwen_image, kandinsky = map(network_module, _MODULES)
    qwen_block = getattr(qwen_image, "QwenImageTransformerBlock", None)
    with (
        replaced_attribute(flux, "apply_mod", partial(_with_modulation, _of_flux)),  # Chroma's and Hunyuan's too
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
    modulated = _with_modulation(_of_stable_diffusion, _plainly_modulated)

    def modulated_and_gate(block: Any, x: Tensor, mod_params: Tensor, timestep_zero_index: Any = None) -> Any:
        if timestep_zero_index is not None:
            return own(block, x, mod_params, timestep_zero_index)
        shift, scale, gate = mod_params.chunk(3, dim=-1)
        return modulated(x, shift, scale), gate.unsqueeze(1)

    return modulated_and_gate


def _plainly_modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def _kandinsky_modulate(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    modulated = _with_modulation(_of_kandinsky, partial(own, lambda normed: normed))
    return lambda norm, x, scale, shift: modulated(norm(x), scale, shift)


def _of_kandinsky(normed: Tensor, scale: Tensor, shift: Tensor) -> _Modulation:
    return _Modulation(normed, scale, shift, plus_one=True)


def _of_kandinsky_gate(x: Tensor, out: Tensor, gate: Tensor) -> _Modulation:
    return _Modulation(out, gate, x)
