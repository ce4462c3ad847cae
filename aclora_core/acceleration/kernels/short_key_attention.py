"""Attention to few keys, such as those of a caption. Importing this file needs Triton.

Libraries share their work out by blocks of keys on the way back, so that with 77 keys most of a GPU has nothing to do.
Here it is shared out by queries: a program holds all keys, and what it finds for them is summed up afterwards, in
float32 and in a fixed order. As in FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithms 2 and 4) the weights
are computed anew on the way back from the logarithm of their sum.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from .launch import launch

_QUERIES, _WARPS = 128, 8  # of a tile


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(s · query keyᵀ) value, (n, heads, queries, channels), float16 or bfloat16 on a CUDA device.

    key, value: (n, heads, keys, channels), of at most MOST_KEYS and MOST_CHANNELS; the channels of all are contiguous.
    In memory the result has the heads after the queries, as layers want it that join them.
    """
    result: Tensor = _Attention.apply(query, key, value, scale)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (n, heads, queries, channels), keys = query.shape, key.shape[2]
        output, logs = _like(query), query.new_empty(n * heads, queries, dtype=torch.float32)
        with torch.cuda.device_of(query):
            launch(
                _forward,
                (triton.cdiv(queries, _QUERIES), n * heads),
                query,
                key,
                value,
                output,
                logs,
                scale,
                heads,
                queries,
                keys,
                *_strides(query, key, value, output),
                *_sizes(keys, channels),
                num_warps=_WARPS,
            )
        ctx.save_for_backward(query, key, value, output, logs)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logs = ctx.saved_tensors
        (n, heads, queries, channels), keys = query.shape, key.shape[2]
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        of_query, of_key, of_value = _like(query), _like(key), _like(value)
        each, parts = _shares(triton.cdiv(queries, _QUERIES), n * heads, _processors(query.device))
        sums = query.new_empty(2, parts, n * heads, keys, channels, dtype=torch.float32)
        with torch.cuda.device_of(query):
            launch(
                _backward,
                (parts, n * heads),
                query,
                key,
                value,
                output,
                gradient,
                of_query,
                sums,
                logs,
                ctx.scale,
                heads,
                queries,
                keys,
                each,
                *_strides(query, key, value, output, gradient, of_query),
                *_sizes(keys, channels),
                num_warps=_WARPS,
                num_stages=1,
            )
            launch(
                _join,
                (keys, n * heads, 2),
                sums,
                of_key,
                of_value,
                heads,
                keys,
                parts,
                *_strides(of_key),
                *_sizes(keys, channels)[1:],
                num_warps=1,
            )
        return of_query, of_key, of_value, None


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shares(tiles: int, heads: int, processors: int) -> tuple[int, int]:
    """How many tiles of queries a program takes, and how many programs a head has, so that the last one ends soonest.

    A processor has room for one program at a time, which spends about as long on its beginning and end as on a tile.
    """
    shares = ((triton.cdiv(tiles, parts), parts) for parts in range(1, tiles + 1))
    return min(shares, key=lambda share: triton.cdiv(heads * share[1], processors) * (share[0] + 1))


def _like(tensor: Tensor) -> Tensor:
    """Room for as much, with the heads after the queries or keys in memory."""
    n, heads, rows, channels = tensor.shape
    return tensor.new_empty(n, rows, heads, channels).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    """Of pictures, heads and rows."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _sizes(keys: int, channels: int) -> tuple[int, int, int, int]:
    """Keys, channels, and both rounded up to what the tensor cores take, as constants of a kernel."""
    keys_, channels_ = (max(16, triton.next_power_of_2(size)) for size in (keys, channels))
    return keys_, channels, channels_, _QUERIES


@triton.jit
def _start(tensor, heads, of_picture, of_head):  # type: ignore[no-untyped-def]
    """Where the rows of a program's head begin."""
    head = tl.program_id(1)
    return tensor + (head // heads).to(tl.int64) * of_picture + (head % heads).to(tl.int64) * of_head


@triton.jit
def _rows(start, row, stride, rows, CHANNELS: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some rows, zero outside."""
    channel = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(start + row[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, row, stride, rows, values, CHANNELS: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(start + row[:, None] * stride + channel[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["scale", "queries", "keys"])
def _forward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    output,
    logs,
    scale,
    heads,
    queries,
    keys,
    q_picture,
    q_head,
    q_row,
    k_picture,
    k_head,
    k_row,
    v_picture,
    v_head,
    v_row,
    o_picture,
    o_head,
    o_row,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    row, place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    q = _rows(_start(query, heads, q_picture, q_head), row, q_row, queries, CHANNELS, PADDED)
    k = _rows(_start(key, heads, k_picture, k_head), place, k_row, keys, CHANNELS, PADDED)
    v = _rows(_start(value, heads, v_picture, v_head), place, v_row, keys, CHANNELS, PADDED)
    likeness = tl.where((place < keys)[None, :], scale * tl.dot(q, tl.trans(k)), float("-inf"))
    highest = tl.max(likeness, 1)
    weights = tl.exp(likeness - highest[:, None])
    total = tl.sum(weights, 1)
    result = tl.dot(weights.to(v.dtype), v) / total[:, None]
    _store(_start(output, heads, o_picture, o_head), row, o_row, queries, result, CHANNELS, PADDED)
    tl.store(logs + tl.program_id(1) * queries + row, highest + tl.log(total), mask=row < queries)


@triton.jit(do_not_specialize=["scale", "queries", "keys", "each"])
def _backward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    output,
    gradient,
    of_query,
    sums,
    logs,
    scale,
    heads,
    queries,
    keys,
    each,
    q_picture,
    q_head,
    q_row,
    k_picture,
    k_head,
    k_row,
    v_picture,
    v_head,
    v_row,
    o_picture,
    o_head,
    o_row,
    g_picture,
    g_head,
    g_row,
    d_picture,
    d_head,
    d_row,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """For `each` tiles of queries their gradients, and what the keys and values get from them."""
    place = tl.arange(0, KEYS)
    k = _rows(_start(key, heads, k_picture, k_head), place, k_row, keys, CHANNELS, PADDED)
    v = _rows(_start(value, heads, v_picture, v_head), place, v_row, keys, CHANNELS, PADDED)
    of_keys, of_values = tl.zeros((KEYS, PADDED), tl.float32), tl.zeros((KEYS, PADDED), tl.float32)
    for tile in range(0, each):
        row = (tl.program_id(0) * each + tile) * QUERIES + tl.arange(0, QUERIES)
        q = _rows(_start(query, heads, q_picture, q_head), row, q_row, queries, CHANNELS, PADDED)
        o = _rows(_start(output, heads, o_picture, o_head), row, o_row, queries, CHANNELS, PADDED)
        g = _rows(_start(gradient, heads, g_picture, g_head), row, g_row, queries, CHANNELS, PADDED)
        log = tl.load(logs + tl.program_id(1) * queries + row, mask=row < queries, other=0.0)
        inside = (row < queries)[:, None] & (place < keys)[None, :]
        weights = tl.where(inside, tl.exp(scale * tl.dot(q, tl.trans(k)) - log[:, None]), 0.0)
        of_values += tl.dot(tl.trans(weights.to(g.dtype)), g)
        common = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
        of_likeness = (weights * (tl.dot(g, tl.trans(v)) - common[:, None]) * scale).to(q.dtype)
        of_keys += tl.dot(tl.trans(of_likeness), q)
        start = _start(of_query, heads, d_picture, d_head)
        _store(start, row, d_row, queries, tl.dot(of_likeness, k), CHANNELS, PADDED)
    part = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * keys * CHANNELS
    _store(sums + part, place, CHANNELS, keys, of_keys, CHANNELS, PADDED)
    part += tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * keys * CHANNELS
    _store(sums + part, place, CHANNELS, keys, of_values, CHANNELS, PADDED)


@triton.jit(do_not_specialize=["keys", "parts"])
def _join(  # type: ignore[no-untyped-def]
    sums,
    of_key,
    of_value,
    heads,
    keys,
    parts,
    of_picture,
    of_head,
    of_row,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """The sum over the parts for one key, and with the second number of the last axis for its value."""
    place, channel = tl.program_id(0), tl.arange(0, PADDED)
    each = tl.num_programs(1).to(tl.int64) * keys * CHANNELS  # numbers of a part
    begin = sums + tl.program_id(2) * parts * each + (tl.program_id(1) * keys + place) * CHANNELS + channel
    total = tl.zeros((PADDED,), tl.float32)
    for part in range(0, parts):
        total += tl.load(begin + part * each, mask=channel < CHANNELS, other=0.0)
    begin = _start(of_key if tl.program_id(2) == 0 else of_value, heads, of_picture, of_head)
    tl.store(begin + place * of_row + channel, total, mask=channel < CHANNELS)
