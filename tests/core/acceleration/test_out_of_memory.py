"""Out of memory is one error, whoever reports it, and nothing else is taken for it."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from aclora_core.acceleration.cuda_graphs import CudaGraphRunner
from aclora_core.acceleration.out_of_memory import out_of_memory_named
from aclora_core.config.train_config import TrainConfig
from tests.support.toy import toy, train

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
DRIVER = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"


@pytest.mark.parametrize("text", [CUBLAS, DRIVER, "MPS backend out of memory (MPS allocated: 8.00 GB)"])
def test_every_form_has_one_name(text: str) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="ALLOC_FAILED|out of memory"), out_of_memory_named():
        raise RuntimeError(text)


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, out_of_memory_named():
        raise error
    assert raised.value is error


def test_what_the_block_allocated_is_freed() -> None:
    class Activations:
        pass

    alive: list[weakref.ref[Activations]] = []

    def step() -> None:
        activations = Activations()
        alive.append(weakref.ref(activations))
        raise RuntimeError(CUBLAS)

    with pytest.raises(torch.cuda.OutOfMemoryError) as raised, out_of_memory_named():
        step()
    assert alive[0]() is None and raised.value.__cause__ is not None  # while the error is held, as by its handler


def test_a_graph_that_finds_no_memory_is_not_taken_for_one_that_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError(DRIVER)

    monkeypatch.setattr(CudaGraphRunner, "_record", full)
    graphs = CudaGraphRunner(torch.device("cpu"))
    graphs.active = True
    with pytest.raises(torch.cuda.OutOfMemoryError):
        graphs.call(lambda argument: None, None)
    assert graphs.active


def test_a_trial_step_that_finds_no_memory_blames_neither_images_nor_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy(4)
    denoise = model.denoise

    def full(*given: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(CUBLAS)
        return denoise(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "denoise", full)
    config = TrainConfig(steps=2, batch_size=2, max_rank=2, layers="attention")
    with pytest.raises(ValueError, match="to train on one image at a time, with every block recomputed: the memory"):
        train(model, config)
    with pytest.raises(ValueError, match="at a time: the memory ran out .* With checkpointing .* at 'automatic'"):
        train(model, replace(config, checkpointing="off"))
