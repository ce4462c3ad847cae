"""Recognise linear layers and convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or a quantised one that has in_features and out_features."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution without groups, padded with zeros."""
    return (
        isinstance(module, tuple(CONVOLUTIONS))
        and getattr(module, "groups", 1) == 1
        and getattr(module, "padding_mode", "zeros") == "zeros"
    )
