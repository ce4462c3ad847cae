"""What PyTorch says of a GPU's memory and time, where there is none and the numbers do not matter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def replace_cuda_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the functions that a measurement of blocks asks; torch.cuda.synchronize is left as it is."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.0)
    for name in ("empty_cache", "reset_peak_memory_stats", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
