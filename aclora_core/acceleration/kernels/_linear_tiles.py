"""What the kernels of linear layers with LoRA branches share.

By itself a branch is narrow matrix products, each of which takes about as long as its launch. These kernels compute
them together with the layer's own product, which reads the same rows anyway. Up to MAX_LAYERS layers of one size that
read the same tensor share a launch. Sums are float32, in a fixed order.

The tensors of several layers are given to a kernel as the address of the first and the offsets of the others. Offsets
are always 64 bits wide, because Triton would compile another variant for each that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._triton import tl, triton
from .kernel import HALF_DTYPES, MAX_LAYERS, MAX_RANK

BLOCK_K = 64  # depth of a step along the summed axis; both sides of a weight must be multiples of it

# BLOCK_M, BLOCK_N, BLOCK_K, warps and stages, by the largest number of rows: the fastest of those tried on an H100.
_TILES = (
    (16, (16, 32, BLOCK_K, 2, 5)),
    (512, (64, 64, BLOCK_K, 4, 4)),
    (1 << 40, (64, 128, BLOCK_K, 4, 4)),
)


def supports_rows(rows: Tensor, rank: int) -> bool:
    """Return whether the kernels can read a matrix (n, channels) and hold a branch of this rank."""
    return rows.dtype in HALF_DTYPES and rows.stride(1) == 1 and len(rows) > 0 and rank <= MAX_RANK


def supports_weight(rows: Tensor, weight: Tensor, rank: int) -> bool:
    """Return whether the kernels can multiply a matrix by a layer's weight (out, in)."""
    in_blocks = all(side % BLOCK_K == 0 for side in weight.shape) and weight.is_contiguous()
    return supports_rows(rows, rank) and in_blocks and weight.dtype == rows.dtype


def tile_for(rows: int) -> tuple[int, int, int, int, int]:
    """Return BLOCK_M, BLOCK_N, BLOCK_K, warps and stages for a number of rows."""
    return next(tile for most, tile in _TILES if rows <= most)


def pointer_offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Offsets of the second to the last of MAX_LAYERS tensors from the first, in elements; 0 for missing ones."""
    offsets = [(tensor.data_ptr() - tensors[0].data_ptr()) // tensor.element_size() for tensor in tensors[1:]]
    return offsets + [0] * (MAX_LAYERS - 1 - len(offsets))


@triton.jit
def pointer_offset(layer, second, third):  # type: ignore[no-untyped-def]
    """The offset of a layer's tensor from that of the first layer."""
    return tl.where(layer == 0, 0, tl.where(layer == 1, second, third)).to(tl.int64)


@triton.jit
def grouped_tile(program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row and column of a program's tile. Eight rows of tiles run together, so that they share their operands."""
    tile_rows, tile_columns = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (8 * tile_columns) * 8
    group = tl.minimum(tile_rows - first, 8)
    rest = program % (8 * tile_columns)
    return (first + rest % group) * BLOCK_M, rest // group * BLOCK_N
