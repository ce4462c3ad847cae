"""LoRAs with a known spectrum, for tests of the nodes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_names(blocks: int) -> list[str]:
    """Return the attention layers of the tiny base's first blocks, of the image stream."""
    attention = "diffusion_model.joint_blocks.{}.x_block.attn.{}"
    return [attention.format(block, part) for block in range(blocks) for part in ("qkv", "proj")]


def halving_lora(names: Sequence[str], rank: int = 6) -> dict[str, Tensor]:
    """Return a LORA_MODEL whose singular values halve, so each has a quarter of the previous one's energy."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in names:
        left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator)).Q for side in (24, 32))
        state[f"{name}.lora_up.weight"] = left.contiguous()
        state[f"{name}.lora_down.weight"] = (right * 2.0 ** -torch.arange(rank)).T.contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    return state
