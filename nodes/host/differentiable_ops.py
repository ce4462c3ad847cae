"""Which of the host's kernels a training uses: those with a way back, and of these the fast ones."""

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


@contextmanager
def kernels_for_training() -> Iterator[None]:
    """As long as the context lasts, everything that the host's networks compute can be differentiated."""
    before = comfy.model_management.in_training
    # Some of the host's fused kernels have no way back; this flag makes most of its networks leave them out.
    comfy.model_management.in_training = True
    try:
        with _plain_rotations(), _fast_rotations(), _whole_products(), _fast_attention():
            yield
    finally:
        comfy.model_management.in_training = before


@contextmanager
def _plain_rotations() -> Iterator[None]:
    """For the networks that ask for the fused kernels all the same, such as Cosmos: the same in plain steps."""
    kitchen = getattr(comfy.quant_ops, "ck", None)
    plain = getattr(getattr(kitchen, "backends", None), "eager", None)
    # Those that end in _ write over what they are given, which no way back would survive.
    names = [name for name in vars(plain or object) if "rope" in name and not name.endswith("_")]
    with ExitStack() as undo:
        for name in names:
            undo.enter_context(replaced(kitchen, name, partial(_take_plain, plain, name)))
        yield


def _take_plain(plain: Any, name: str, own: Any) -> Any:
    return getattr(plain, name)


@contextmanager
def replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Has owner.name be change(what it was) as long as the context lasts; nothing where there is none."""
    own = getattr(owner, name, None)
    try:
        if own is not None:
            setattr(owner, name, change(own))
        yield
    finally:
        if own is not None:
            setattr(owner, name, own)


def _fast_rotations() -> AbstractContextManager[None]:
    """A kernel of ours for the rotations that the networks take from Flux's as long as in_training is set."""

    def rotating(others: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def rotated(x: Tensor, table: Tensor) -> Tensor:
            kernels = find_kernels(x.device, x.dtype, "transformer")
            if kernels is None or not kernels.rope.supports(x, table):
                return others(x, table)
            return kernels.rope(x, table)

        return rotated

    return replaced(flux, "_apply_rope1", rotating)


def _whole_products() -> AbstractContextManager[None]:
    """The host's products in fp8 have no way back: each would be tried, fail with a line in the log, and be done anew.

    What its layers do then, they do at once where there is no such product.
    """
    return replaced(comfy.ops, "fp8_linear", lambda own: lambda layer, input: None)


@contextmanager
def _fast_attention() -> Iterator[None]:
    """cuDNN's attention first: on an H100 its way back takes half the time of the one that the host prefers."""
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", [])  # there only with a GPU
    before = list(order)
    order.sort(key=lambda backend: backend.name != "CUDNN_ATTENTION")
    try:
        with replaced(comfy.ops, "scaled_dot_product_attention", _for_few_keys):
            yield
    finally:
        order[:] = before


def _for_few_keys(others: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The host's attention, with a kernel of ours where it is that to a caption and nothing special is asked for."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        special = args or kwargs.get("attn_mask") is not None
        special = special or any(kwargs.get(name) for name in kwargs.keys() - {"attn_mask", "scale"})
        special = special or k.shape[-2] > MAX_KEYS  # asked here, so that kernels nobody needs are not compiled
        kernels = None if special else find_kernels(q.device, q.dtype, "unet")
        if kernels is None or not kernels.short_key_attention.supports(q, k, v):
            return others(q, k, v, *args, **kwargs)
        return kernels.short_key_attention(q, k, v, kwargs.get("scale") or q.shape[-1] ** -0.5)

    return attention
