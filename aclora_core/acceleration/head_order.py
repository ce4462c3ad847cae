"""Heads of an attention that stay in the order in which they are in memory.

A linear layer writes the heads of a token side by side, and networks view them as (batch, heads, tokens, width).
PyTorch joins such views slowly and into the order of the view, and it copies the gradient of a split twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOKENS = 2  # the axis in (batch, heads, tokens, width)


class KeepHeadOrder(TorchFunctionMode):
    """Join and split heads where they lie token by token in memory, with the same values and gradients.

    Heads in that order also count as contiguous, so code that flattens them after contiguous() fails in this mode.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.contiguous and len(args) == 1 and not kwargs and _are_heads(args[0]):
            return args[0]
        if func is torch.cat and args and _can_join(*args, **kwargs):
            return _Join.apply(*args[0])
        if func is Tensor.unbind and args and _can_split(*args, **kwargs):
            return _Split.apply(args[0])
        return func(*args, **kwargs)


def _are_heads(x: Tensor) -> bool:
    """Whether x is (batch, heads, tokens, width), and a token's heads are side by side in memory."""
    return x.dim() == 4 and x.stride(3) == 1 and x.stride(1) == x.shape[3] < x.stride(2)


def _can_join(tensors: Any, dim: Any = 0, **kwargs: Any) -> bool:
    """Whether arguments of torch.cat are heads of some tokens each, which differ in the number of tokens alone."""
    if kwargs or dim != _TOKENS or not all(map(_are_heads, tensors)):
        return False
    return len({(it.dtype, it.device, it.shape[:_TOKENS], it.shape[3]) for it in tensors}) == 1


def _can_split(x: Tensor, dim: int = 0) -> bool:
    """Whether an argument of unbind is (parts, batch, heads, tokens, width), and a token's parts are side by side."""
    if dim != 0 or x.dim() != 5 or not x.requires_grad:
        return False
    parts, _, heads, _, width = x.shape
    part_stride, _, head_stride, token_stride, column_stride = x.stride()
    heads_are_together = column_stride == 1 and head_stride == width and part_stride == heads * width
    return heads_are_together and token_stride >= parts * part_stride


class _Join(torch.autograd.Function):
    """Heads of some tokens each, (batch, heads, tokens, width) -> those of all tokens."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        batch, heads, _, width = parts[0].shape
        ctx.counts = [part.shape[_TOKENS] for part in parts]
        tokens, row = sum(ctx.counts), heads * width
        # Not a view, which autograd would not let others write to.
        joined = parts[0].new_empty_strided((batch, heads, tokens, width), (tokens * row, width, row, 1))
        for place, part in zip(joined.split(ctx.counts, _TOKENS), parts, strict=True):
            place.copy_(part)
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.split(ctx.counts, _TOKENS)


class _Split(torch.autograd.Function):
    """(parts, batch, heads, tokens, width) -> each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return x.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None
        parts, batch, heads, tokens, width = ctx.shape
        joined = given.new_empty(batch, tokens, parts, heads, width).permute(2, 0, 3, 1, 4)
        for place, grad in zip(joined, grads, strict=True):
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad)
        return joined
