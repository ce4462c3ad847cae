"""The memory plan over a grid of made-up sizes: what it plans fits, uses what is there, and says so."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from aclora_core.acceleration import (
    ActivationCheckpointing,
    ActivationSizes,
    Copies,
    WeightStream,
    best_plan,
    gather_weights,
)
from aclora_core.config import TrainConfig
from aclora_core.training import memory
from aclora_core.training.memory import MemoryPlan
from aclora_core.training.too_little_memory import bytes_missing
from tests.support.toy import toy, train

BLOCKS = 8
MB = 10**6
SECONDS = 0.01  # of a block's forward pass


class Planned:
    """A plan for a network whose memory is made up, in MB, on a GPU that is not there."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        total: int,
        activations: int,
        least: int,
        streamed: bool,
        caption: int = 0,
    ) -> None:
        monkeypatch.setattr(memory, "_LEFT_FREE", 0)
        monkeypatch.setattr(memory, "largest_batch", lambda *_: (1, 0))
        network = nn.ModuleList(nn.ModuleList([nn.Linear(500, 1000), nn.Linear(1000, 500)]) for _ in range(BLOCKS))
        self.stream = WeightStream(network, network, gather_weights(network), torch.device("cpu")) if streamed else None
        self.total, self.weights = total * MB, sum(4 * parameter.numel() for parameter in network.parameters())
        self.checkpointing = ActivationCheckpointing(network)
        self.sizes = ActivationSizes([activations * MB] * BLOCKS, least * MB, least * MB, forward=[SECONDS] * BLOCKS)
        monkeypatch.setattr(self.checkpointing, "measure", self._measure)
        self.paced: bool | None = None  # whether the measured step was
        self.allocated, self.wanted = 0, list[int]()
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.allocated)
        model = SimpleNamespace(
            device=torch.device("cuda"),
            weight_stream=self.stream,
            free_memory=self._free_memory,
            text_encoders={"text.": None} if caption else {},
        )
        self.progress = SimpleNamespace(memory="")
        config = SimpleNamespace(accumulate=2)
        images = SimpleNamespace(conditioning=lambda indices: self._encode(caption * MB))
        batches = SimpleNamespace(indices=[0], images=images, rows=1, trial=lambda index: None, config=config)
        adapted = SimpleNamespace(
            model=model,
            checkpointing=self.checkpointing,
            require_recomputing=self._require,
            recomputed_if_streamed=set,
            graphs=SimpleNamespace(active=True, in_pace=streamed),
        )
        stepper = SimpleNamespace(clear_gradients=lambda: None)
        self.plan = MemoryPlan(*[as_any(it) for it in (adapted, stepper, batches, self.progress)], "automatic")

    def _free_memory(self, wanted: int) -> int:
        self.wanted.append(wanted)
        return self.free

    def _measure(self, loss: object, in_pace: bool) -> ActivationSizes:
        self.paced = in_pace
        return self.sizes

    def _encode(self, size: int) -> None:
        self.allocated += size

    def _require(self) -> None:
        self.checkpointing.required = set(self.stream.streamed) if self.stream else set()

    @property
    def on_device(self) -> int:
        """Bytes of the weights that are kept, and of the ring."""
        if self.stream is None:
            return self.weights
        kept = set(range(BLOCKS)) - set(self.stream.streamed)
        return sum(self.stream.sizes[index] for index in kept) + (
            3 * self.stream.sizes[0] if self.stream.streamed else 0
        )

    @property
    def free(self) -> int:
        return self.total - self.on_device

    @property
    def step(self) -> int:
        """Bytes that the planned step needs."""
        return self.sizes.peak(1, self.checkpointing.recomputed | self.checkpointing.required)


def as_any(value: object) -> Any:
    return value


@pytest.mark.parametrize("total", range(12, 80, 4))
@pytest.mark.parametrize(("activations", "least"), [(1, 2), (4, 5), (9, 1)])
@pytest.mark.parametrize("streamed", [True, False])
def test_what_is_planned_fits(
    monkeypatch: pytest.MonkeyPatch, total: int, activations: int, least: int, streamed: bool
) -> None:
    it = Planned(monkeypatch, total, activations, least, streamed)
    with it.stream.loaded() if it.stream else pytest.MonkeyPatch.context():
        it._require()
        if least * MB > it.free:
            with pytest.raises(ValueError, match="GB are missing. Close other programs"):
                it.plan.make()
            return
        it.plan.make()
        assert it.step <= it.free and it.paced is streamed
        recomputed = it.checkpointing.recomputed | it.checkpointing.required
        assert f"{len(recomputed)} of {BLOCKS} blocks recomputed" in it.progress.memory
        if it.stream and it.stream.streamed:
            assert f"the weights of {len(it.stream.streamed)} of {BLOCKS} blocks streamed" in it.progress.memory
        elif recomputed:
            assert 0.9 * it.free < it.step + activations * MB


@pytest.mark.parametrize("total", range(22, 50, 4))
@pytest.mark.parametrize("rate", [0.05, 0.4, 10])  # blocks that are copied while one computes
@pytest.mark.parametrize("pinned", [True, False])
def test_no_other_number_of_streamed_blocks_takes_less_time(
    monkeypatch: pytest.MonkeyPatch, total: int, rate: float, pinned: bool
) -> None:
    it = Planned(monkeypatch, total, 2, 3, True)
    assert it.stream
    with it.stream.loaded():
        it._require()
        monkeypatch.setattr(it.stream, "measured_rate", lambda: rate * it.stream.sizes[0] / SECONDS)
        it.stream.all_pinned = pinned
        it.plan.make()
        chosen, seconds = len(it.stream.streamed), []
        for number in range(BLOCKS + 1):
            it.stream.stream(range(number))
            it._require()
            copies = Copies((1.1 if pinned else 1) * number * SECONDS / rate, pinned)
            plan = best_plan(it.sizes, 1, it.free, it.checkpointing.required, copies)
            seconds.append(plan.seconds if plan.fits else math.inf)
    assert seconds[chosen] == pytest.approx(min(seconds)) and chosen == min(
        number for number in range(BLOCKS + 1) if seconds[number] == pytest.approx(min(seconds))
    )


def test_fast_copies_leave_memory_for_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rate in (0.05, 10):
        it = Planned(monkeypatch, 36, 2, 3, True)
        assert it.stream
        with it.stream.loaded():
            it._require()
            it.stream.all_pinned = True
            monkeypatch.setattr(
                it.stream, "measured_rate", lambda rate=rate, it=it: rate * it.stream.sizes[0] / SECONDS
            )
            it.plan.make()
            counts.append((len(it.stream.streamed), len(it.checkpointing.recomputed)))
    (slow_streamed, slow_recomputed), (streamed, recomputed) = counts
    assert slow_streamed < streamed and slow_recomputed > recomputed


def test_captions_that_are_encoded_before_a_step_leave_less_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, learning = (Planned(monkeypatch, 48, 2, 2, False, caption=caption) for caption in (0, 2))
    for it in (plain, learning):
        it.plan.make()
    free = learning.free - 2 * 2 * MB  # a step has two micro-batches of one image
    assert learning.step <= free < plain.step
    assert f"of {free / 1e9:.1f} GB free" in learning.progress.memory


def test_others_are_asked_for_as_much_as_the_fastest_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Planned(monkeypatch, 400, 2, 2, False, caption=2)
    it.plan.make()
    assert it.wanted[0] * 0.9 == pytest.approx(it.sizes.peak(1, set()) + 0.9 * 4 * MB, abs=1)
    it.total = it.wanted[0] + it.on_device  # no more than that
    it.plan.make()
    assert not it.checkpointing.recomputed


def test_the_time_of_a_step_is_added_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Planned(monkeypatch, 80, 1, 1, False)
    it.plan.make()
    now = iter(range(100))
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(now) * 0.095)
    for _ in range(10):
        it.plan.step_ended()
    assert "a step takes some" in it.progress.memory
    assert it.progress.memory.endswith(", about 384 ms a step")  # two batches of one image: 2 * 8 * 2.4 * 10 ms
    for _ in range(20):
        it.plan.step_ended()
    assert it.progress.memory.endswith(", 95 ms a step") and it.progress.memory.count("ms a step") == 1


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 512.00 "
            "MiB is free. Including non-PyTorch memory, this process has 7.10 GiB memory in use.",
            2 * 2**30,
        ),
        ("Allocation on device", 0),  # cudaMallocAsync says no more
    ],
)
def test_what_is_missing_is_read_from_the_error(message: str, missing: int) -> None:
    assert bytes_missing(torch.cuda.OutOfMemoryError(message)) == missing


def test_a_trial_step_that_runs_out_of_memory_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB; 1.00 GiB is free")

    monkeypatch.setattr("aclora_core.training.trainer.warm_up", full)
    with pytest.raises(ValueError, match=r"at least 2\.1 GB are missing\. Close other programs.*GGUF"):
        train(toy(2), TrainConfig(steps=2, max_rank=2, held_out=0.0))
