"""Random LoRAs whose layers differ in rank and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def random_lora(shapes: Mapping[str, Sequence[int]], size: float = 1.0) -> dict[str, Tensor]:
    """Return a LORA_MODEL with ranks of 1 to 3 and scales of 1/6 to 2.

    Args:
        shapes: of the weights, by the layer's name.
        size: factor on the change of each weight.
    """
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (base, (out, *columns)) in enumerate(shapes.items()):
        rank = 1 + number % 3
        up = torch.randn(out, rank, generator=generator) * size
        state[f"{base}.lora_up.weight"] = up.reshape(out, rank, *[1] * (len(columns) - 1))
        state[f"{base}.lora_down.weight"] = torch.randn(rank, *columns, generator=generator)
        state[f"{base}.alpha"] = torch.tensor(0.5 * (1 + number % 4))
    return state
