"""Attention to few keys, such as those of a caption.

In the backward pass libraries split their work by blocks of keys, so with 77 keys most of a GPU is idle. Here it is
split by queries: a program holds all keys, and their gradients are added up afterwards, in float32 and in a fixed
order. As in FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithms 2 and 4) the backward pass recomputes the
attention weights from the log-sum-exp of the scores.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .kernel import HALF_DTYPES, MAX_KEYS, Draw, Kernel
from .launch import launch

_BLOCK_Q, _WARPS = 128, 8  # of a tile
_MAX_CHANNELS = 128  # of a head


def short_key_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale · query keyᵀ) value, float16 or bfloat16.

    Args:
        query: (n, heads, queries, channels); the channels of all three are contiguous.
        key: (n, heads, keys, channels), at most MAX_KEYS keys and 128 channels.
        value: like key.
        scale: of the scores, most often channels ** -0.5.

    Returns:
        (n, heads, queries, channels), with the heads after the queries in memory, so that layers can join them.
    """
    result: Tensor = _ShortKeyAttention.apply(query, key, value, scale)
    return result


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Half precision, few keys, and heads that do not share keys; libraries are faster for many keys."""
    for tensor in (query, key, value):
        if tensor.dim() != 4 or tensor.dtype not in HALF_DTYPES or tensor.stride(-1) != 1:
            return False
        if tensor.dtype != query.dtype or tensor.device.type != query.device.type:
            return False
    if not 0 < key.shape[2] <= MAX_KEYS or query.shape[-1] > _MAX_CHANNELS or query.numel() == 0:
        return False
    return key.shape == value.shape and key.shape[:2] == query.shape[:2] and key.shape[3] == query.shape[3]


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute short_key_attention in plain PyTorch, in float32; loading a library's kernel would take long."""
    weights = torch.softmax(scale * query.float() @ key.float().mT, -1)
    return (weights @ value.float()).to(query.dtype)


def examples(draw: Draw) -> Iterator[tuple[Any, ...]]:
    """The keys of a CLIP caption."""
    query, key, value = (draw(1, 2, rows, 64).requires_grad_() for rows in (70, 77, 77))
    yield query, key, value, 0.125


KERNEL = Kernel("unet", short_key_attention, supports, reference, examples)


class _ShortKeyAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (n, heads, queries, channels), keys = query.shape, key.shape[2]
        output, lse = _empty_like(query), query.new_empty(n * heads, queries, dtype=torch.float32)
        with torch.cuda.device_of(query):
            launch(
                _forward,
                (triton.cdiv(queries, _BLOCK_Q), n * heads),
                query,
                key,
                value,
                output,
                lse,
                scale,
                heads,
                queries,
                keys,
                *_strides(query, key, value, output),
                *_sizes(keys, channels),
                num_warps=_WARPS,
            )
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        (n, heads, queries, channels), keys = query.shape, key.shape[2]
        grad_output = grad_output if grad_output.stride(-1) == 1 else grad_output.contiguous()
        grad_query, grad_key, grad_value = _empty_like(query), _empty_like(key), _empty_like(value)
        tiles_per_split, splits = _split_queries(
            triton.cdiv(queries, _BLOCK_Q), n * heads, _multiprocessors(query.device)
        )
        partial_sums = query.new_empty(2, splits, n * heads, keys, channels, dtype=torch.float32)
        with torch.cuda.device_of(query):
            launch(
                _backward,
                (splits, n * heads),
                query,
                key,
                value,
                output,
                grad_output,
                grad_query,
                partial_sums,
                lse,
                ctx.scale,
                heads,
                queries,
                keys,
                tiles_per_split,
                *_strides(query, key, value, output, grad_output, grad_query),
                *_sizes(keys, channels),
                num_warps=_WARPS,
                num_stages=1,
            )
            launch(
                _reduce,
                (keys, n * heads, 2),
                partial_sums,
                grad_key,
                grad_value,
                heads,
                keys,
                splits,
                *_strides(grad_key),
                *_sizes(keys, channels)[1:],
                num_warps=1,
            )
        return grad_query, grad_key, grad_value, None


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _split_queries(tiles: int, heads: int, processors: int) -> tuple[int, int]:
    """Return the tiles of queries of a program, and the programs of a head, so that the last program ends soonest.

    A multiprocessor runs one program at a time, which spends about as long on its start and end as on a tile.
    """
    candidates = [(triton.cdiv(tiles, splits), splits) for splits in range(1, tiles + 1)]

    def duration(candidate: tuple[int, int]) -> int:
        tiles_per_split, splits = candidate
        waves = triton.cdiv(heads * splits, processors)
        return int(waves * (tiles_per_split + 1))

    return min(candidates, key=duration)


def _empty_like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape, with the heads after the queries or keys in memory."""
    n, heads, rows, channels = tensor.shape
    return tensor.new_empty(n, rows, heads, channels).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, heads and rows."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _sizes(keys: int, channels: int) -> tuple[int, int, int, int]:
    """Padded keys, channels, padded channels and queries of a tile; tensor cores take powers of two from 16."""
    padded_keys = max(16, triton.next_power_of_2(keys))
    padded_channels = max(16, triton.next_power_of_2(channels))
    return padded_keys, channels, padded_channels, _BLOCK_Q


@triton.jit
def _head_start(tensor, heads, batch_stride, head_stride):  # type: ignore[no-untyped-def]
    """Address of the first row of a program's head."""
    head = tl.program_id(1)
    return tensor + (head // heads).to(tl.int64) * batch_stride + (head % heads).to(tl.int64) * head_stride


@triton.jit
def _load_rows(start, row, stride, rows, CHANNELS: tl.constexpr, PADDED_CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load rows, zero outside."""
    channel = tl.arange(0, PADDED_CHANNELS)
    mask = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(start + row[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(start, row, stride, rows, values, CHANNELS: tl.constexpr, PADDED_CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, PADDED_CHANNELS)
    mask = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(start + row[:, None] * stride + channel[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["scale", "queries", "keys"])
def _forward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    output,
    lse,
    scale,
    heads,
    queries,
    keys,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    BLOCK_KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    row, key_index = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KEYS)
    q = _load_rows(_head_start(query, heads, q_batch, q_head), row, q_row, queries, CHANNELS, PADDED_CHANNELS)
    k = _load_rows(_head_start(key, heads, k_batch, k_head), key_index, k_row, keys, CHANNELS, PADDED_CHANNELS)
    v = _load_rows(_head_start(value, heads, v_batch, v_head), key_index, v_row, keys, CHANNELS, PADDED_CHANNELS)
    scores = tl.where((key_index < keys)[None, :], scale * tl.dot(q, tl.trans(k)), float("-inf"))
    max_score = tl.max(scores, 1)
    weights = tl.exp(scores - max_score[:, None])
    total = tl.sum(weights, 1)
    result = tl.dot(weights.to(v.dtype), v) / total[:, None]
    _store_rows(_head_start(output, heads, o_batch, o_head), row, o_row, queries, result, CHANNELS, PADDED_CHANNELS)
    tl.store(lse + tl.program_id(1) * queries + row, max_score + tl.log(total), mask=row < queries)


@triton.jit(do_not_specialize=["scale", "queries", "keys", "tiles_per_split"])
def _backward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    output,
    grad_output,
    grad_query,
    partial_sums,
    lse,
    scale,
    heads,
    queries,
    keys,
    tiles_per_split,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    g_batch,
    g_head,
    g_row,
    d_batch,
    d_head,
    d_row,
    BLOCK_KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """The gradients of some tiles of queries, and their share of the gradients of all keys and values."""
    key_index = tl.arange(0, BLOCK_KEYS)
    k = _load_rows(_head_start(key, heads, k_batch, k_head), key_index, k_row, keys, CHANNELS, PADDED_CHANNELS)
    v = _load_rows(_head_start(value, heads, v_batch, v_head), key_index, v_row, keys, CHANNELS, PADDED_CHANNELS)
    grad_k = tl.zeros((BLOCK_KEYS, PADDED_CHANNELS), tl.float32)
    grad_v = tl.zeros((BLOCK_KEYS, PADDED_CHANNELS), tl.float32)
    for tile in range(0, tiles_per_split):
        row = (tl.program_id(0) * tiles_per_split + tile) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q = _load_rows(_head_start(query, heads, q_batch, q_head), row, q_row, queries, CHANNELS, PADDED_CHANNELS)
        o = _load_rows(_head_start(output, heads, o_batch, o_head), row, o_row, queries, CHANNELS, PADDED_CHANNELS)
        g = _load_rows(_head_start(grad_output, heads, g_batch, g_head), row, g_row, queries, CHANNELS, PADDED_CHANNELS)
        row_lse = tl.load(lse + tl.program_id(1) * queries + row, mask=row < queries, other=0.0)
        mask = (row < queries)[:, None] & (key_index < keys)[None, :]
        weights = tl.where(mask, tl.exp(scale * tl.dot(q, tl.trans(k)) - row_lse[:, None]), 0.0)
        grad_v += tl.dot(tl.trans(weights.to(g.dtype)), g)
        delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        grad_scores = (weights * (tl.dot(g, tl.trans(v)) - delta[:, None]) * scale).to(q.dtype)
        grad_k += tl.dot(tl.trans(grad_scores), q)
        start = _head_start(grad_query, heads, d_batch, d_head)
        _store_rows(start, row, d_row, queries, tl.dot(grad_scores, k), CHANNELS, PADDED_CHANNELS)
    offset = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * keys * CHANNELS
    _store_rows(partial_sums + offset, key_index, CHANNELS, keys, grad_k, CHANNELS, PADDED_CHANNELS)
    offset += tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * keys * CHANNELS
    _store_rows(partial_sums + offset, key_index, CHANNELS, keys, grad_v, CHANNELS, PADDED_CHANNELS)


@triton.jit(do_not_specialize=["keys", "splits"])
def _reduce(  # type: ignore[no-untyped-def]
    partial_sums,
    grad_key,
    grad_value,
    heads,
    keys,
    splits,
    batch_stride,
    head_stride,
    row_stride,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Add up the splits for one key (third program axis 0) or its value (1)."""
    key_index, channel = tl.program_id(0), tl.arange(0, PADDED_CHANNELS)
    split_size = tl.num_programs(1).to(tl.int64) * keys * CHANNELS
    begin = partial_sums + tl.program_id(2) * splits * split_size
    begin = begin + (tl.program_id(1) * keys + key_index) * CHANNELS + channel
    total = tl.zeros((PADDED_CHANNELS,), tl.float32)
    for split in range(0, splits):
        total += tl.load(begin + split * split_size, mask=channel < CHANNELS, other=0.0)
    begin = _head_start(grad_key if tl.program_id(2) == 0 else grad_value, heads, batch_stride, head_stride)
    tl.store(begin + key_index * row_stride + channel, total, mask=channel < CHANNELS)
