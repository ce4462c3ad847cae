"""The driver gives the memory of graphs back, where it allocated it."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from aclora_core.acceleration import graph_memory
from aclora_core.acceleration.graph_memory import release_graph_memory

DEVICE = torch.device("cuda:0")
# Prints how many MB are less free than at the start: with a graph, without it, and after its memory is given back.
GRAPH = """
import torch
from aclora_core.acceleration.graph_memory import release_graph_memory
torch.cuda.init()
start = torch.cuda.mem_get_info()[0]
def less_free():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return (start - torch.cuda.mem_get_info()[0]) // 2**20
graph, result = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
with torch.cuda.graph(graph):
    result.copy_(torch.ones(2**28, device="cuda").sum())
graph.replay()
before = less_free()
del graph
without = less_free()
release_graph_memory(torch.device("cuda"))
print(before, without, less_free())
"""


@pytest.mark.parametrize(("backend", "calls"), [("native", 0), ("cudaMallocAsync", 2)])
def test_the_driver_is_asked_where_it_allocates(backend: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            cuDeviceGet=lambda handle, index: asked.append(f"device {index}") or 0,
            cuDeviceGraphMemTrim=lambda handle: asked.append("trim") or 0,
        )

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(graph_memory.ctypes, "CDLL", load)
    release_graph_memory(DEVICE)
    assert asked == ["device 0", "trim"][:calls]


def test_another_driver_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(graph_memory.ctypes, "CDLL", load)
    release_graph_memory(DEVICE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_memory_of_a_graph_comes_back() -> None:
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    words = [sys.executable, "-c", GRAPH]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=120)
    with_graph, without, released = map(int, run.stdout.split())
    assert with_graph > 900 and released < 200, f"without the graph, before it was asked: {without} MB"
