"""Which modules are linear layers or convolutions, for the rooms that have to know."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def is_linear(module: nn.Module) -> bool:
    """Also true for the quantised layers of hosts and packs, which are no nn.Linear but look like one."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def is_plain_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, tuple(CONVOLUTIONS))
        and getattr(module, "groups", 1) == 1
        and getattr(module, "padding_mode", "zeros") == "zeros"
    )
