"""How many processes train together, and how that is said."""

from __future__ import annotations

import torch.distributed

from ....aclora_core.config import TrainConfig
from ....aclora_core.text import count_noun
from ... import host

ALL = "all"
CHOICES = ["1", ALL, *map(str, range(2, 17))]


def process_count(gpus: object) -> int:
    """Return how many processes train together.

    Args:
        gpus: one of CHOICES, or anything else that a prompt may hold. Where ComfyUI computes on the CPU, the number is
            that of processes on the CPU.

    Raises:
        ValueError: it is none of them, or there are fewer GPUs.
    """
    if host.processes().size > 1:  # torchrun has started several already
        return 1
    if not isinstance(gpus, str) or gpus not in CHOICES:
        raise ValueError(f"gpus must be '{ALL}' or a number from 1 to {CHOICES[-1]}.")
    available = host.gpu_count()
    wanted = max(1, available) if gpus == ALL else int(gpus)
    if available and wanted > available:
        raise ValueError(
            f"gpus is {wanted}, but ComfyUI can use {count_noun(available, 'GPU')}. Set gpus on AC-LoRA Speed Options "
            f"to {available} or less. A GPU that is missing may be hidden by --cuda-device or CUDA_VISIBLE_DEVICES."
        )
    if wanted > 1 and not torch.distributed.is_available():
        raise ValueError("This PyTorch has no torch.distributed, which several GPUs need. Set gpus to 1.")
    return wanted


def sharing_text(size: int, config: TrainConfig) -> str:
    """Return how a step is shared: "2 GPUs, 2 images each a step"."""
    images = count_noun(config.batch_size * config.accumulate, "image")
    who = f"{size} GPUs" if host.gpu_count() else f"{size} processes on the CPU"
    return f"{who}, {images} each a step"
