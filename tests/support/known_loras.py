"""LoRAs whose spectrum is known, for tests of the nodes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_names(blocks: int) -> list[str]:
    """The attention layers of the first blocks of the tiny base's picture side."""
    attention = "diffusion_model.joint_blocks.{}.x_block.attn.{}"
    return [attention.format(block, part) for block in range(blocks) for part in ("qkv", "proj")]


def halving_lora(names: Sequence[str], rank: int = 6) -> dict[str, Tensor]:
    """A LORA_MODEL whose components halve from one to the next, so each holds a quarter of the energy before it."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in names:
        left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator)).Q for side in (24, 32))
        state[f"{name}.lora_up.weight"] = left.contiguous()
        state[f"{name}.lora_down.weight"] = (right * 2.0 ** -torch.arange(rank)).T.contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    return state
