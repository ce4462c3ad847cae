"""Which of the host's kernels a training uses: those with a way back, and of these the fast ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
from comfy.ldm.flux import math as flux
from torch import Tensor

from ...aclora_core.kernels import MOST_KEYS, find_kernels


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
    fused = {name: getattr(kitchen, name) for name in names if callable(getattr(kitchen, name, None))}
    try:
        for name in fused:
            setattr(kitchen, name, getattr(plain, name))
        yield
    finally:
        for name, function in fused.items():
            setattr(kitchen, name, function)


@contextmanager
def _fast_rotations() -> Iterator[None]:
    """A kernel of ours for the rotations that the networks take from Flux's."""
    own = getattr(flux, "_apply_rope1", None)  # what the host takes as long as in_training is set

    def rotated(x: Tensor, table: Tensor) -> Tensor:
        kernels = find_kernels(x.device, x.dtype, "sequences")
        if kernels is None or not kernels.take_rotation(x, table):
            return own(x, table)
        return kernels.rotate(x, table)

    try:
        if own is not None:
            flux._apply_rope1 = rotated
        yield
    finally:
        if own is not None:
            flux._apply_rope1 = own


@contextmanager
def _whole_products() -> Iterator[None]:
    """The host's products in fp8 have no way back: each would be tried, fail with a line in the log, and be done anew.

    What its layers do then, they do at once where there is no such product.
    """
    before = getattr(comfy.ops, "fp8_linear", None)
    try:
        if before is not None:
            comfy.ops.fp8_linear = lambda layer, input: None
        yield
    finally:
        if before is not None:
            comfy.ops.fp8_linear = before


@contextmanager
def _fast_attention() -> Iterator[None]:
    """cuDNN's attention first: on an H100 its way back takes half the time of the one that the host prefers."""
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", [])  # there only with a GPU
    before = list(order)
    order.sort(key=lambda backend: backend.name != "CUDNN_ATTENTION")
    own = comfy.ops.scaled_dot_product_attention
    comfy.ops.scaled_dot_product_attention = _for_few_keys(own)
    try:
        yield
    finally:
        order[:] = before
        comfy.ops.scaled_dot_product_attention = own


def _for_few_keys(others: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The host's attention, with a kernel of ours where it is that to a caption and nothing special is asked for."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        special = args or kwargs.get("attn_mask") is not None
        special = special or any(kwargs.get(name) for name in kwargs.keys() - {"attn_mask", "scale"})
        special = special or k.shape[-2] > MOST_KEYS
        kernels = None if special else find_kernels(q.device, q.dtype, "pictures")
        if kernels is None or not kernels.take_attention(q, k, v):
            return others(q, k, v, *args, **kwargs)
        return kernels.attention(q, k, v, kwargs.get("scale") or q.shape[-1] ** -0.5)

    return attention
