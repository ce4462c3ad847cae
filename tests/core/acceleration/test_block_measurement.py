"""Blocks are measured by kind: a few of each, and the others need what these need."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from aclora_core.acceleration.block_measurement import BlockMeasurement, kind_of


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU on which memory is what `allocated` says, and everything takes `seconds`."""
    found = SimpleNamespace(allocated=0, seconds=2.0)
    event = SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1000 * found.seconds
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: found.allocated)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    return found


def test_a_few_of_a_kind_are_measured(gpu: SimpleNamespace) -> None:
    measurement, ran = BlockMeasurement(6), list[tuple[str, bool]]()

    def run(index: int, kind: str, saved: int) -> Tensor:
        def compute(way: str, saved: int) -> Callable[[], Tensor]:
            def computed() -> Tensor:
                ran.append((way, torch.is_grad_enabled()))
                output = torch.ones(2, requires_grad=True) * 3
                gpu.allocated += saved + output.nbytes
                return output

            return computed

        output = measurement.run(index, kind, compute("plainly", saved), compute("selectively", saved // 10))
        assert isinstance(output, Tensor) and output.requires_grad and output.tolist() == [3.0, 3.0]
        return output

    for index, seconds in enumerate((3.0, 1.0, 9.0, 9.0)):
        gpu.seconds = seconds
        run(index, "double", 100 + index)
    assert ran == [("selectively", True), ("plainly", True)] * 3 + [("plainly", False)]
    gpu.seconds = 2.0
    run(4, "single", 50)
    for _ in range(2):
        run(5, "single", 60)
    assert measurement.blocks == [
        (100, 10, 3.0),
        (101, 10, 1.0),
        (102, 10, 9.0),
        (102, 10, 1.0),  # what the last needed that was measured, in the shortest time
        (50, 5, 2.0),
        (120, 12, 4.0),  # both of its calls
    ]


def test_blocks_of_other_needs_are_of_other_kinds() -> None:
    layer, image = nn.Linear(4, 4), torch.ones(2, 4)
    known = kind_of(layer, ((image,), {"caption": image}))
    assert kind_of(nn.Linear(4, 4), ((image + 1,), {"caption": image})) == known
    others = [
        kind_of(nn.Linear(4, 5), ((image,), {"caption": image})),
        kind_of(nn.Linear(4, 4).half(), ((image,), {"caption": image})),
        kind_of(nn.Sequential(layer), ((image,), {"caption": image})),
        kind_of(layer, ((image[:1],), {"caption": image})),
        kind_of(layer, ((image,), {"caption": image[:1]})),
    ]
    assert known not in others
    with torch.no_grad():
        assert kind_of(layer, ((image,), {"caption": image})) != known
    learning = nn.Sequential(nn.Linear(4, 4))
    frozen = kind_of(learning, image)
    hook = learning[0].register_forward_hook(lambda *_: None)
    assert kind_of(learning, image) != frozen
    hook.remove()
    learning[0].forward = layer.forward
    assert kind_of(learning, image) != frozen


class Quantised:
    """As ComfyUI's: a weight made of other tensors, with the size and dtype of the original."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.data = torch.ones(2, 2).to(dtype)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data"], None


def test_other_formats_of_quantised_weights_are_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.Linear(2, 2)
    kinds = []
    for dtype in (torch.float8_e4m3fn, torch.int8):
        monkeypatch.setattr(block, "parameters", lambda dtype=dtype: iter([Quantised(dtype)]))
        kinds.append(kind_of(block, ()))
    assert kinds[0] != kinds[1]
