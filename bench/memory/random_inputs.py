"""A node pack for bench.memory.server, which copies it into custom_nodes: random latents and captions.

A training then needs neither the text encoder of a model nor its VAE, and both nodes get the same.
"""

from __future__ import annotations

from typing import Any

import torch

_COUNT = 8


class RandomTrainingInputs:
    """Return random LATENTs of one image each, and a CONDITIONING for each; a pooled width of 0 leaves it out."""

    RETURN_TYPES = ("LATENT", "CONDITIONING")
    OUTPUT_IS_LIST = (True, True)
    FUNCTION = "make"
    CATEGORY = "bench"
    SIZES = ("channels", "height", "width", "tokens", "text_width", "pooled_width", "frames")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {name: ("INT", {"default": 0, "max": 10**6}) for name in cls.SIZES}}

    def make(self, **sizes: int) -> tuple[list[Any], list[Any]]:
        channels, height, width, tokens, text_width, pooled_width, frames = (sizes[name] for name in self.SIZES)
        generator = torch.Generator().manual_seed(0)
        shape = (1, channels, *[1] * frames, height, width)
        latents = [{"samples": torch.randn(shape, generator=generator)} for _ in range(_COUNT)]
        captions = []
        for _ in range(_COUNT):
            pooled = torch.randn(1, pooled_width, generator=generator) if pooled_width else None
            captions.append([[torch.randn(1, tokens, text_width, generator=generator), {"pooled_output": pooled}]])
        return latents, captions


# Without a literal key, so that programs that list the nodes of packs do not take it for one of this pack's.
NODE_CLASS_MAPPINGS = {node.__name__: node for node in (RandomTrainingInputs,)}
