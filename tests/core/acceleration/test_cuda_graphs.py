"""CUDA graphs: a failed capture leaves nothing behind. Captures themselves need a GPU; test_stepper.py tests them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aclora_core.acceleration.cuda_graphs import CudaGraphRunner, _Captured, _leaves_on
from aclora_core.config.train_config import TrainConfig
from aclora_core.storage.nested import tensors_in
from tests.support.toy import toy, train

CPU = torch.device("cpu")
FULL = torch.cuda.OutOfMemoryError("CUDA out of memory")


class Replayed:
    """In place of a CUDA graph: runs the captured function again."""

    def __init__(self, function: Callable[[Any], Any], argument: Any, output: Tensor | None) -> None:
        self.function, self.argument, self.output = function, argument, output

    def replay(self) -> None:
        result = self.function(self.argument)
        if isinstance(self.output, Tensor):
            self.output.copy_(result)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[str], bool]]:
    """Capture and replay functions on the CPU; "fails" says by their names which of them run out of memory."""
    wishes: dict[str, Callable[[str], bool]] = {"fails": lambda name: False}

    def capture(graphs: CudaGraphRunner, function: Callable[[Any], Any], argument: Any) -> _Captured:
        fixed = _leaves_on(CPU, argument, copy=True)
        output = function(fixed)  # the first run, in which libraries choose their kernels
        if wishes["fails"](getattr(function, "__name__", "")):
            raise FULL
        return _Captured(Replayed(function, fixed, output), list(tensors_in(fixed)), output)  # type: ignore[arg-type]

    init = CudaGraphRunner.__init__

    def active(graphs: CudaGraphRunner, device: torch.device, enabled: bool = True, buffers: object = None) -> None:
        init(graphs, device, enabled)
        graphs.active = True

    monkeypatch.setattr(CudaGraphRunner, "__init__", active)
    monkeypatch.setattr(CudaGraphRunner, "_capture", capture)
    return wishes


def add_one(state: Tensor) -> Callable[[None], None]:
    def step(argument: None) -> None:
        state.add_(1)

    return step


def test_the_run_before_a_capture_is_undone_also_if_memory_runs_out(captures) -> None:
    state = torch.zeros(3)
    graphs, step = CudaGraphRunner(CPU), add_one(state)
    captures["fails"] = lambda name: True
    with pytest.raises(torch.cuda.OutOfMemoryError):
        graphs.call(step, None, "step", [state])
    assert torch.equal(state, torch.zeros(3))
    captures["fails"] = lambda name: False
    graphs.call(step, None, "step", [state])
    graphs.call(step, None, "step", [state])
    assert torch.equal(state, torch.full((3,), 2.0))


def test_graphs_that_leave_no_room_for_another_are_captured_again(captures) -> None:
    state, tries = torch.zeros(3), list[str]()

    def while_another_is_there(name: str) -> bool:
        tries.append(name)
        return len(tries) == 2

    graphs, first, second = CudaGraphRunner(CPU), add_one(state), add_one(state)
    captures["fails"] = while_another_is_there
    graphs.call(first, None, "first", [state])
    graphs.call(second, None, "second", [state])
    assert graphs.is_captured(second, "second") and not graphs.is_captured(first, "first")
    graphs.call(first, None, "first", [state])
    assert torch.equal(state, torch.full((3,), 3.0)) and len(tries) == 4


@pytest.mark.parametrize("what", ["_update", "_forward_backward"])
def test_a_step_repeated_with_less_memory_counts_once(captures, what: str) -> None:
    """Memory runs out while a step or the update is captured, also with no other graph in the way."""
    config = TrainConfig(steps=4, batch_size=4, max_rank=2, mode="off", held_out=0.0, layers="attention")
    tries: list[str] = []

    def twice(name: str) -> bool:
        tries.append(name)
        return name == what and tries.count(what) <= 2

    calm = train(toy(8), config)
    captures["fails"] = twice
    pressed = train(toy(8), config)
    assert tries.count(what) > 2
    assert "images go through the model 2 at a time" in pressed.report.facts.notes
    torch.testing.assert_close(pressed.report.losses, calm.report.losses, rtol=1e-4, atol=1e-6)
    up, expected = (result.adapter.layers["toy.attn"].lora_up for result in (pressed, calm))
    torch.testing.assert_close(up, expected, rtol=1e-4, atol=1e-6)


def test_a_result_is_read_where_no_more_memory_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is launched by then: an error would repeat the step, which would count twice."""
    empty_like, event = torch.empty_like, SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)

    def refuse(tensor: Tensor, **options: Any) -> Tensor:
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", refuse)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    graphs = CudaGraphRunner(CPU)
    graphs.device = torch.device("cuda")
    assert graphs.async_read(torch.tensor([3.0, 4.0]))() == [3.0, 4.0]


def test_a_capture_that_finds_no_memory_is_known_by_its_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch ends the failed capture with another error, which hides that of the driver."""
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    graphs = CudaGraphRunner(CPU)
    graphs.active = True
    try:
        try:
            raise RuntimeError("CUDA error: out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            graphs._disable(error)
    assert graphs.active
