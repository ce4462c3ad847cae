"""Triton's kernels: right in its interpreter, and not missed where they cannot be had."""

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from aclora_core.acceleration import kernels
from aclora_core.acceleration.kernels import KernelGroup, Kernels, find_kernels
from aclora_core.acceleration.kernels import self_test as trial
from tests.support.kernel_stand_ins import stand_ins

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was found out about a device holds for one test."""
    find_kernels.cache_clear()
    yield
    find_kernels.cache_clear()


@pytest.mark.slow
def test_kernels_agree_with_float64_in_the_interpreter() -> None:
    """In a process of its own: Triton decides once, when it is imported, whether it compiles or interprets."""
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch's CUDA build on Linux")
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=file.parents[4], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("cuda", torch.float64), ("meta", torch.bfloat16)])
def test_other_devices_and_types_have_none_and_nothing_is_said(
    device: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "aclora"):
        assert find_kernels(torch.device(device), dtype, "layers") is None
    assert not caplog.records


@pytest.mark.parametrize("found", [0.5, float("nan"), RuntimeError("Failed to find C compiler.\nAnd more.")])
def test_kernels_that_fail_or_are_wrong_are_not_used_and_it_is_said_once(
    found: float | Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def largest_error(*_: object) -> float:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(trial, "largest_error", largest_error)
    with caplog.at_level(logging.INFO, "aclora"):
        assert find_kernels(CUDA, torch.bfloat16, "pictures") is None
        assert find_kernels(CUDA, torch.bfloat16, "pictures") is None
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.INFO and message.startswith("AC-LoRA: ") and "\n" not in message


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "largest_error", lambda *_: 0.0)
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    of_rows = "geglu", "gelu", "group_norm", "layer_norm", "rms_norm", "rotation", "rows"
    for name in ("linear", "convolution", "attention", "adamw", *of_rows, "blocks", "launch"):
        monkeypatch.delitem(sys.modules, f"aclora_core.acceleration.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    assert find_kernels(CUDA, torch.bfloat16, "pictures") is None


def test_kernels_that_work_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch's CUDA build on Linux")
    monkeypatch.setattr(trial, "largest_error", lambda *_: 0.001)
    found = find_kernels(CUDA, torch.bfloat16, "layers")
    assert found is not None and found.device == "cuda"


def test_the_trial_measures_how_wrong_a_kernel_is() -> None:
    right = stand_ins(Kernels, Counter())

    def error(**wrong: Any) -> float:
        wrong_ones = right._replace(**wrong)
        return max(
            trial.largest_error(wrong_ones, torch.device("cpu"), torch.float32, part) for part in get_args(KernelGroup)
        )

    def unshifted(x: Tensor, *more: Any) -> Tensor:
        *most, shift = more if len(more) > 5 else (*more, None)
        return right.group_norm(x, *most) + 0 * (0 if shift is None else shift[:, :, None, None])

    def unadded(x: Tensor, added: Tensor | None, *more: Any) -> tuple[Tensor, Tensor]:
        return right.residual_norm(x, None if added is None else 0 * added, *more)

    assert error() < 1e-6
    assert error(geglu=lambda hidden: right.geglu(hidden) * 1.1) == pytest.approx(0.1, rel=1e-3)
    assert error(group_norm=lambda *a: right.group_norm(*a[:5], shift=a[6] if len(a) > 6 else None)) > 0.1  # no SiLU
    assert error(group_norm=unshifted) > 0.1 and error(residual_norm=unadded) > 0.1
    without = lambda *a: right.layer_norm(*a).detach() + 0 * a[0]  # noqa: E731
    assert error(layer_norm=without) == pytest.approx(1)  # its gradient is zero
    assert error(rms_norm=lambda x, weight, eps: right.rms_norm(x, 1 + 0 * weight, eps)) > 0.1
    assert error(rotate=lambda x, table: right.rotate(x, table.mT)) > 0.1  # the other way
    assert error(gelu=lambda x, tanh: right.gelu(x, not tanh)) > 1e-4


def test_pictures_are_taken_whose_channels_come_last() -> None:
    ours = Kernels("cpu", *[None] * 11)  # type: ignore[arg-type]
    first = torch.zeros(2, 3, 4, 5)
    last = first.contiguous(memory_format=torch.channels_last)
    assert ours.take_picture(last) and not ours.take_picture(first)
    assert not ours.take_picture(last[:, :, ::2]) and not ours.take_picture(last.permute(0, 2, 3, 1))
    assert not ours.take_picture(torch.zeros(2, 3, 1, 1)) and not ours.take_picture(last.double())
    assert not ours.take_picture(torch.zeros(2, 3)) and not Kernels("cuda", *[None] * 11).take_picture(last)  # type: ignore[arg-type]


class Recorded:
    """Stands in for a kernel: what it would be compiled for, and whether it was run."""

    class Parameter:
        def __init__(self, is_constexpr: bool = False, do_not_specialize: bool = False) -> None:
            self.is_constexpr, self.do_not_specialize = is_constexpr, do_not_specialize

    def __init__(self, fails: bool = False) -> None:
        self.params = [self.Parameter(), self.Parameter(), self.Parameter(do_not_specialize=True), self.Parameter(True)]
        self.compiled: list[tuple] = []
        self.fails = fails

    def warmup(self, *arguments: object, grid: tuple, **options: object) -> None:
        self.compiled.append((*arguments, options))
        if self.fails:
            raise RuntimeError("no such instruction")


def test_kernels_of_a_first_pass_are_compiled_once_each_and_not_run() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch's CUDA build on Linux")
    from aclora_core.acceleration.kernels.launch import compiling_together, launch

    kernel, failing, x = Recorded(), Recorded(fails=True), torch.zeros(4)
    with compiling_together(torch.device("cpu")):
        launch(kernel, (1,), x, 16, 5, 2)
        launch(kernel, (9,), x + 1, 32, 6, 2)  # the same variant: both numbers are multiples of 16
        launch(kernel, (1,), x, 17, 5, 2)
        launch(kernel, (1,), x.double(), 16, 5, 2)
        launch(kernel, (1,), x, 16, 5, 3)
        launch(kernel, (1,), x, 16, 5, 2, num_warps=8)
        launch(failing, (1,), x, 16, 5, 2)
    assert len(kernel.compiled) == 5 and len(failing.compiled) == 1
    assert (torch.float32, 16, 5, 2, {}) in kernel.compiled  # types, so that no tensor was kept
    with pytest.raises(TypeError):  # afterwards kernels are run, and this is none
        launch(kernel, (1,), x, 16, 5, 2)


def test_kernels_run_again_after_a_first_pass_that_fails() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch's CUDA build on Linux")
    from aclora_core.acceleration.kernels import launch as launching

    kernel = Recorded()
    with pytest.raises(ValueError, match="stop"), launching.compiling_together(torch.device("cpu")):
        launching.launch(kernel, (1,), torch.zeros(1), 16, 5, 2)
        raise ValueError("stop")
    assert launching._compile is None


def test_long_sums_are_left_to_the_libraries() -> None:
    ours = Kernels("cpu", *[None] * 11)  # type: ignore[arg-type]
    half = torch.float16
    weight, wide = torch.zeros(1280, 1280, dtype=half), torch.zeros(10240, 1280, dtype=half)
    rows = torch.zeros(1024, 1280, dtype=half)
    assert ours.take_forward(rows, weight, 16) and ours.take_backward(rows, weight, 16)
    assert not ours.take_forward(rows, wide, 16) and not ours.take_backward(rows, wide, 16)
    assert not ours.take_forward(rows, weight.t()[:, :100], 16)  # not whole, nor a multiple of 64
    assert not ours.take_forward(rows.float(), weight.float(), 16) and not ours.take_forward(rows, weight, 65)
    assert ours.take_sums(rows, rows, 64) and not ours.take_sums(rows.expand(17, -1, -1).reshape(-1, 1280), rows, 16)
    sizes = (16, 64), (16, 128), (4, 64)
    small, large, thin = (torch.zeros(1, count, side, side, dtype=half) for count, side in sizes)
    assert ours.take_convolution(large, 64, 16) and not ours.take_convolution(thin, 64, 16)
    assert ours.take_way_back(small, small, 16) and not ours.take_way_back(large, large, 16)


def test_attention_to_many_keys_is_left_to_the_libraries() -> None:
    ours = Kernels("cpu", *[None] * 11)  # type: ignore[arg-type]
    query, caption, long = (torch.zeros(1, 2, rows, 64, dtype=torch.float16) for rows in (900, 77, 231))
    assert ours.take_attention(query, caption, caption)
    assert not ours.take_attention(query, long, long) and not ours.take_attention(query, caption, long)
    assert not ours.take_attention(query.float(), caption.float(), caption.float())
    assert not ours.take_attention(query, caption[:, :1], caption[:, :1])  # heads that share keys


def test_rotations_are_taken_that_fit_their_table() -> None:
    ours = Kernels("cpu", *[None] * 11)  # type: ignore[arg-type]
    x, table = torch.zeros(2, 3, 5, 8), torch.zeros(1, 1, 5, 4, 2, 2)
    assert ours.take_rotation(x, table) and ours.take_rotation(x.half(), table.expand(2, 1, 5, 4, 2, 2))
    for other in (table.double(), table[0], table[:, :, :4], table[..., :1], table.clone().requires_grad_()):
        assert not ours.take_rotation(x, other)
    assert not ours.take_rotation(x[..., :6], table) and not ours.take_rotation(x[0], table)
    assert not ours.take_rotation(x.double(), table) and not ours.take_rotation(x[:, :, :0], table[:, :, :0])
