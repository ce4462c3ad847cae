"""An eager step waits for the GPU where its allocator would take more memory otherwise, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from aclora_core.acceleration import cuda_graphs
from aclora_core.acceleration.activation_checkpointing import ActivationCheckpointing
from aclora_core.acceleration.cuda_graphs import CudaGraphRunner
from aclora_core.acceleration.kernels import launch
from aclora_core.acceleration.pace import keep_pace, paced
from aclora_core.config.train_config import TrainConfig
from aclora_core.lora.injection import injected
from aclora_core.lora.parameters import FlatParameters, LoraSpec, make_parameters
from aclora_core.lora.targets import preset_layers
from aclora_core.training.progress import Progress
from aclora_core.training.trainer import Trainer
from tests.support.toy import toy
from tests.support.without_gpu import replace_cuda_measurements

CPU = torch.device("cpu")
# Prints how many MB the allocator took at most for tensors that grow, as a CPU far ahead of the GPU frees them.
GROWING = """
import sys
import torch
from aclora_core.acceleration.pace import keep_pace, paced
torch.zeros(1, device="cuda")
torch.cuda.reset_peak_memory_stats()
with paced(sys.argv[1] == "paced"):
    for size in range(100, 300, 10):
        keep_pace()
        tensor = torch.empty(size * 2**20, dtype=torch.uint8, device="cuda").fill_(1)
        torch.cuda._sleep(10**7)
        del tensor
torch.cuda.synchronize()
print(torch.cuda.max_memory_reserved() // 2**20)
"""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that the CPU waited, as on a machine with a GPU and cudaMallocAsync."""
    waited: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(None))
    return waited


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@contextmanager
def adapted(network: Network) -> Iterator[tuple[ActivationCheckpointing, FlatParameters]]:
    """Put an adapter on a network whose blocks can be recomputed."""
    layers = preset_layers(network.requires_grad_(False), "all")
    weights = make_parameters(layers, LoraSpec(2, 2.0), torch.Generator().manual_seed(1), CPU)
    checkpointing = ActivationCheckpointing(network)
    with injected(layers, weights.layers, lambda module: True), checkpointing.attached():
        yield checkpointing, weights


def test_the_cpu_waits_only_within_the_context(waits: list[None]) -> None:
    keep_pace()
    with paced(False):
        keep_pace()
    assert not waits
    with pytest.raises(ValueError, match="of a step"), paced():
        keep_pace()
        with paced(False):
            keep_pace()
        keep_pace()
        raise ValueError("of a step")
    keep_pace()
    assert len(waits) == 2


@pytest.mark.parametrize(("available", "backend"), [(True, "native"), (False, "cudaMallocAsync")])
def test_pytorchs_own_allocator_needs_no_waiting(
    waits: list[None], available: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    with paced():
        keep_pace()
    assert not waits


def test_backward_passes_in_another_thread_wait_too(waits: list[None]) -> None:
    with paced():
        thread = threading.Thread(target=keep_pace)
        thread.start()
        thread.join()
    assert len(waits) == 1


def waits_of_a_step(waits: list[None], recomputed: set[int]) -> tuple[int, int]:
    """Return how often a forward and a backward pass through two blocks of two layers wait."""
    with adapted(network := Network()) as (checkpointing, weights), paced():
        checkpointing.recomputed = recomputed
        loss = network(torch.randn(3, 6)).square().sum()
        forward = len(waits)
        loss.backward()
    assert weights.gradient.abs().sum() > 0
    return forward, len(waits) - forward


def test_a_step_waits_in_each_layer_of_both_passes(waits: list[None]) -> None:
    assert waits_of_a_step(waits, set()) == (4, 4)


def test_a_recomputed_block_waits_before_each_of_its_passes(waits: list[None]) -> None:
    assert waits_of_a_step(waits, {0, 1}) == (4 + 2, 4 + 4 + 2)


@pytest.mark.parametrize(("in_pace", "expected"), [(True, (4 + 2) + (4 + 4 + 2)), (False, 0)])
def test_the_measured_step_is_paced_and_the_timed_blocks_are_not(
    in_pace: bool, expected: int, waits: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_cuda_measurements(monkeypatch)
    with adapted(network := Network()) as (checkpointing, _):
        checkpointing.measure(lambda: network(torch.randn(3, 6)).square().sum(), in_pace)
    assert len(waits) == expected + 1  # one after the step, whatever was wanted


@pytest.mark.parametrize("in_pace", [True, False])
def test_the_trial_step_is_paced(in_pace: bool, waits: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = toy()
    trainer = Trainer(model, model, TrainConfig(max_rank=2), [0], Progress(2), 2)
    trainer.adapted.graphs.in_pace = in_pace
    with trainer.ready():
        assert bool(waits) is in_pace


def test_the_run_before_a_capture_is_paced_and_the_capture_is_not(
    waits: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[bool] = []

    def step(argument: None) -> None:
        before = len(waits)
        keep_pace()
        waited.append(len(waits) > before)

    def without_a_gpu(*_: object, **__: object) -> nullcontext[None]:
        return nullcontext()

    monkeypatch.setattr(cuda_graphs, "_capture_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    for name in ("stream", "graph", "current_stream", "empty_cache", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, without_a_gpu)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    graphs = CudaGraphRunner(CPU)
    graphs.active = graphs.in_pace = True
    graphs.call(step, None)
    assert waited == [True, False]


def test_kernels_wait_when_they_run_and_not_when_they_are_compiled(
    waits: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: ran.append(grid)

    with paced():
        launch.launch(Kernel(), (3,))
        monkeypatch.setattr(launch, "_compile", lambda *noted: None)
        launch.launch(Kernel(), (3,))
    assert ran == [(3,)] and len(waits) == 1


@pytest.mark.parametrize(
    ("streamed", "enabled", "expected"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_steps_are_paced_where_weights_are_streamed_and_graphs_replay_them(
    streamed: bool, enabled: bool, expected: bool, waits: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    buffers = SimpleNamespace(content=None) if streamed else None
    graphs = CudaGraphRunner(torch.device("cuda"), enabled, buffers)  # type: ignore[arg-type]
    assert graphs.in_pace is expected
    graphs.active = False  # as after a capture that failed: the plan counted on paced steps
    graphs.device = CPU
    graphs.call(lambda argument: keep_pace(), None)
    assert bool(waits) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_paced_step_takes_less_memory() -> None:
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}

    def taken(how: str) -> int:
        words = [sys.executable, "-c", GROWING, how]
        run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=120)
        return int(run.stdout)

    ahead, in_pace = taken("ahead"), taken("paced")
    assert in_pace < 400 and ahead > 1.2 * in_pace, f"{ahead} MB, paced {in_pace} MB"
