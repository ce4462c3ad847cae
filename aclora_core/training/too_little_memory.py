"""What to tell where not even one image fits on the GPU."""

from __future__ import annotations

import re

import torch

from .adapted_model import AdaptedModel

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}  # of PyTorch's messages
_WHAT_HELPS = (
    "Close other programs that use the GPU, use smaller images (resolution on Load AC-LoRA Dataset), choose "
    "'attention' for layers, or lower max_rank."
)
_WHAT_HELPS_WITH_BLOCKS = " With checkpointing (AC-LoRA Speed Options) at 'automatic' a step needs less."
_WHAT_HELPS_WITH_WEIGHTS = " A smaller file of the model, in fp8 or GGUF, leaves more room too."


class TooLittleMemoryError(ValueError):
    """One image does not fit on the GPU.

    Attributes:
        whole: whether all weights were on the GPU, so that streaming them would leave more memory.
    """

    def __init__(self, missing: int, adapted: AdaptedModel, recomputed: bool = True) -> None:
        """Tell what is missing and what helps.

        Args:
            missing: bytes; 0 if unknown.
            adapted: the model and its adapter.
            recomputed: whether every block was recomputed.
        """
        self.whole = adapted.model.weight_stream is None
        ways = ["every block recomputed"] * recomputed + ["all weights streamed"] * (not self.whole)
        how = f", with {' and '.join(ways)}" if ways else ""
        amount = (
            f"at least {missing / 1e9:.1f} GB are missing" if missing > 0 else "the memory ran out in the trial step"
        )
        more = "" if recomputed else _WHAT_HELPS_WITH_BLOCKS
        more += _WHAT_HELPS_WITH_WEIGHTS if self.whole else ""
        super().__init__(
            f"There is too little GPU memory to train on one image at a time{how}: {amount}. {_WHAT_HELPS}{more}"
        )


def bytes_missing(error: torch.cuda.OutOfMemoryError) -> int:
    """Return how many bytes PyTorch's message says are missing at the least; 0 where it does not say."""
    numbers = re.search(r"Tried to allocate ([0-9.]+ \w+).*?([0-9.]+ \w+) is free", str(error), re.DOTALL)
    if numbers is None:
        return 0
    wanted, free = (float(amount) * _UNITS.get(unit, 0) for amount, unit in map(str.split, numbers.groups()))
    return max(0, int(wanted - free))
