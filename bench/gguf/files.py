"""GGUF files of a network with random weights, in every type that ComfyUI-GGUF reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Scales(NamedTuple):
    """Where a block has its float16 scale and that of its minimum, and their ratio for a mean of about 0."""

    scale: int  # byte
    minimum: int | None = None  # byte
    ratio: float = 0.0


# Types that the package gguf reads and does not write.
RANDOM_BLOCKS = {
    "Q6_K": Scales(208),
    "Q5_K": Scales(0, 2, 15.5),
    "Q4_K": Scales(0, 2, 7.5),
    "Q3_K": Scales(108),
    "Q2_K": Scales(80, 82, 1.5),
    "IQ4_NL": Scales(0),
    "IQ4_XS": Scales(0),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", *RANDOM_BLOCKS)


def random_blocks(kind: Any, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Return the bytes of a random matrix (rows, columns) in a type, scaled to keep activations near 1."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    _set_scale(blocks, RANDOM_BLOCKS[kind.name], 1.0)
    deviation = gguf.dequantize(blocks.reshape(rows, -1), kind).std()
    _set_scale(blocks, RANDOM_BLOCKS[kind.name], columns**-0.5 / deviation)
    return blocks.reshape(rows, -1)


def _set_scale(blocks: np.ndarray[Any, Any], scales: Scales, scale: float) -> None:
    for start, value in ((scales.scale, scale), (scales.minimum, scale * scales.ratio)):
        if start is not None:
            blocks[..., start : start + 2] = np.array([value], dtype=np.float16).view(np.uint8)


def stored(weight: Tensor, name: str) -> tuple[np.ndarray[Any, Any], Any]:
    """Return a weight as a file holds it, and its type there: the one named, or F16 where that does not divide it.

    As in files of UNets, rows that the type does not divide are joined and cut anew.
    """
    import gguf

    values, kind = weight.float().numpy(), gguf.GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[kind][0]
    if values.size % size:
        kind = gguf.GGMLQuantizationType.F16
    elif values.shape[-1] % size:
        values = values.reshape(-1, size)
    if values.ndim > 4:  # a file has at most four dimensions
        values = values.reshape(len(values), -1)
    if kind.name in RANDOM_BLOCKS:
        return random_blocks(kind, *values.reshape(-1, values.shape[-1]).shape), kind
    return gguf.quantize(values, kind), kind


def write_file(path: Path, name: str, network: nn.Module) -> dict[str, Tensor]:
    """Write a network as a GGUF file, the matrices of its layers in a type, and return the weights dequantised."""
    import gguf

    layers = {f"{key}.weight" for key, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    writer, dequantised = gguf.GGUFWriter(path, "flux"), {}
    for key, weight in network.state_dict().items():
        data, kind = stored(weight, "F32" if weight.ndim < 2 else name if key in layers else "F16")
        values = np.array(gguf.dequantize(data, kind))
        if values.shape != tuple(weight.shape):
            writer.add_array(f"comfy.gguf.orig_shape.{key}", tuple(weight.shape))
        writer.add_tensor(key, data, raw_dtype=kind)
        dequantised[key] = torch.from_numpy(values).reshape(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantised
