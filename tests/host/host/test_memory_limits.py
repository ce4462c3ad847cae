"""How much GPU memory a training may use, and which models are loaded whole for it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

GB = 1024**3
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(pack, monkeypatch) -> SimpleNamespace:
    """A GPU that is not there: its free memory, and what the process has allocated of it."""
    import comfy.model_management as management

    state = SimpleNamespace(free=8 * GB, allocated=1 * GB, unloaded=0)

    def unload() -> None:
        state.unloaded += 1

    monkeypatch.setattr(management, "get_free_memory", lambda device: state.free)
    monkeypatch.setattr(management, "unload_all_models", unload)
    monkeypatch.setattr(management, "soft_empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state.allocated)
    return state


def patcher(size: float, loaded: float = 0.0) -> Any:
    return SimpleNamespace(
        load_device=CUDA,
        offload_device=torch.device("cpu"),
        model_size=lambda: int(size * GB),
        loaded_size=lambda: int(loaded * GB),
    )


def test_limits_leave_memory_alone(pack, gpu) -> None:
    limits = pack.nodes.host.loading.MemoryLimits
    assert limits().free(CUDA) == 8 * GB
    assert limits(most=6 * GB).free(CUDA) == 5 * GB  # one is allocated already
    assert limits(most=20 * GB).free(CUDA) == 8 * GB
    assert limits(reserved=GB).free(CUDA) == 7 * GB
    assert limits(most=GB // 2).free(CUDA) == 0


def test_a_model_of_half_the_free_memory_is_loaded_whole(pack, gpu) -> None:
    loading = pack.nodes.host.loading
    assert loading.fits(patcher(3.9)) and not gpu.unloaded
    assert not loading.fits(patcher(4.1)) and gpu.unloaded == 1  # other models were asked to go
    assert loading.fits(patcher(5.0, loaded=5.0))  # what it takes already does not count
    assert not loading.fits(patcher(3.9), loading.MemoryLimits(most=4 * GB))


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_with_lowvram_and_novram_every_model_is_streamed(pack, gpu, monkeypatch, state: str) -> None:
    import comfy.model_management as management

    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    assert not pack.nodes.host.loading.fits(patcher(0.1))


def test_a_vae_on_the_gpu_gets_room_for_a_tile(pack) -> None:
    host = pack.nodes.host
    vae = SimpleNamespace(
        device=CUDA,
        latent_channels=4,
        latent_dim=2,
        vae_dtype=torch.bfloat16,
        model_size=lambda: 10**8,
        memory_used_decode=lambda shape, dtype: shape[-1] * shape[-2] * 10**5,
    )
    reserved = host.memory_limits(6.5, vae)
    assert reserved.most == int(6.5 * GB) and 10**8 < reserved.reserved < 4 * 10**8
    vae.device = torch.device("cpu")
    assert host.memory_limits(0.0, vae) == host.memory_limits(0.0) == pack.nodes.host.loading.MemoryLimits()
