"""Whether a frozen model larger than a card should be spread over two cards, or streamed from main memory.

Both ways bring the blocks that a card does not hold while it computes. Measured is how fast they come, alone and beside
products that keep the card busy without a pause, which no training does: from pinned main memory to both cards at once,
and from each card to the other at once. The rate alone gives the least time of a step, for a model and cards of a given
size; bench.memory measures a step that streams.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

BLOCK = 256 * 2**20  # bytes of one copy: about a block of Flux.1 in bf16
REPEATS = 24
FLUX = 23.8e9  # bytes of Flux.1's weights in bf16
FREE = 16 * 2**30  # bytes of each card
STEP = 4 * 10**9  # of these, what a step itself takes, with all blocks recomputed
PASSES = 2  # forward and backward: each block comes twice a step
COMPUTES = 0.536  # seconds of such a step on one H200 without any copies (docs/state.md)


def rate(source: str, busy: bool) -> float:
    """Return the bytes a second that each of two cards gets, both at once.

    Args:
        source: "main memory", or "other card".
        busy: whether both compute meanwhile.
    """
    rates, ready = [0.0, 0.0], threading.Barrier(2)

    def work(card: int) -> None:
        device = torch.device("cuda", card)
        place = "cpu" if source == "main memory" else torch.device("cuda", 1 - card)
        block = torch.empty(BLOCK, dtype=torch.uint8, device=place, pin_memory=source == "main memory")
        into = torch.empty(BLOCK, dtype=torch.uint8, device=device)
        matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        copies, products = torch.cuda.Stream(device), torch.cuda.Stream(device)
        with torch.cuda.device(device):
            into.copy_(block)
            torch.cuda.synchronize(device)
            ready.wait()
            began = time.perf_counter()
            with torch.cuda.stream(products):
                for _ in range(REPEATS * 40 if busy else 0):  # longer than the copies take
                    matrix @ matrix
            with torch.cuda.stream(copies):
                for _ in range(REPEATS):
                    into.copy_(block, non_blocking=True)
            copies.synchronize()
            rates[card] = REPEATS * BLOCK / (time.perf_counter() - began)
            torch.cuda.synchronize(device)

    threads = [threading.Thread(target=work, args=(card,)) for card in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(rates)


def seconds_a_step(rate: float, model: float = FLUX, free: float = FREE, step: float = STEP) -> float:
    """Return how long a step takes at least, where copies and computing overlap fully.

    Args:
        rate: bytes a second that come to a card.
        model: bytes of the weights.
        free: bytes of the card.
        step: bytes that a step itself takes.
    """
    missing = max(0.0, model - (free - step))
    return max(COMPUTES, PASSES * missing / rate)


def measured() -> dict[str, Any]:
    """Return the rates in bytes a second, and the seconds of a step that follow from them, by source."""
    found: dict[str, Any] = {"peer_access": torch.cuda.can_device_access_peer(0, 1)}
    for source in ("main memory", "other card"):
        rates = {"alone": rate(source, False), "busy": rate(source, True)}
        found[source] = {**rates, "seconds_a_step": seconds_a_step(rates["alone"])}
    return found
