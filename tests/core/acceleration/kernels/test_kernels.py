"""The set of fused kernels: found only where they work, and used only within their limits."""

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from aclora_core.acceleration import kernels
from aclora_core.acceleration.kernels import Kernel, KernelGroup, Kernels, find_kernels, self_test
from tests.support.kernel_stand_ins import reference_kernels

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    """Forget which kernels were found, before and after a test."""
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
def test_other_devices_and_dtypes_have_no_kernels_and_log_nothing(
    device: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "aclora"):
        assert find_kernels(torch.device(device), dtype, "lora") is None
    assert not caplog.records


@pytest.mark.parametrize("found", [0.5, float("nan"), RuntimeError("Failed to find C compiler.\nAnd more.")])
def test_kernels_that_fail_their_self_test_are_not_used_and_logged_once(
    found: float | Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def max_relative_error(*_: object) -> float:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(self_test, "max_relative_error", max_relative_error)
    with caplog.at_level(logging.INFO, "aclora"):
        assert find_kernels(CUDA, torch.bfloat16, "unet") is None
        assert find_kernels(CUDA, torch.bfloat16, "unet") is None
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.INFO and message.startswith("AC-LoRA: ") and "\n" not in message


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton be missing, and the files that have imported it be imported again."""
    for name in ("triton", "triton.language", "triton.runtime.jit"):
        monkeypatch.setitem(sys.modules, name, None)
    package = kernels.__name__
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        short = name.removeprefix(f"{package}.")
        if short not in ("kernel", "self_test"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(kernels, short, raising=False)


@pytest.mark.usefixtures("without_triton")
def test_without_triton_no_kernels_are_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(self_test, "max_relative_error", lambda *_: 0.0)
    with caplog.at_level(logging.INFO, "aclora"):
        assert find_kernels(CUDA, torch.bfloat16, "unet") is None
    assert "triton" in caplog.text


@pytest.mark.usefixtures("without_triton")
def test_without_triton_references_limits_and_examples_are_there() -> None:
    for kernel in Kernels("cpu").by_name().values():
        for arguments in kernel.examples(torch.randn):
            self_test.is_supported(kernel, arguments)
            kernel.reference(*arguments)


def test_importing_the_core_does_not_import_triton() -> None:
    code = "import sys, aclora_core, aclora_core.acceleration; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4], check=True)


def test_kernels_that_work_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch's CUDA build on Linux")
    monkeypatch.setattr(self_test, "max_relative_error", lambda *_: 0.001)
    found = find_kernels(CUDA, torch.bfloat16, "lora")
    assert found is not None and found.device == "cuda"


@pytest.mark.parametrize("name", list(Kernels("cpu").by_name()))
def test_examples_are_within_the_limits_of_their_kernel(name: str) -> None:
    kernel = Kernels("cpu").by_name()[name]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    examples = list(kernel.examples(draw))
    assert examples and all(self_test.is_supported(kernel, arguments) for arguments in examples)


def test_each_kernel_belongs_to_a_group() -> None:
    found = Kernels("cpu")
    groups = [found.of_group(group) for group in get_args(KernelGroup)]
    assert all(groups) and sum(map(len, groups)) == len(found.by_name())


def self_test_error(found: Kernels, dtype: torch.dtype = torch.float32, **operations: Any) -> float:
    """The self-test's error of all kernels, some of whose operations are replaced."""
    by_name = found.by_name() | {name: replace(getattr(found, name), operation=it) for name, it in operations.items()}
    return self_test.max_relative_error(by_name.values(), torch.device("cpu"), dtype)


def test_self_test_measures_the_error_of_results_and_gradients() -> None:
    right = reference_kernels(Kernels, Counter())

    def unshifted(x: Tensor, *more: Any) -> Tensor:
        *most, shift = more if len(more) > 5 else (*more, None)
        return right.group_norm(x, *most) + 0 * (0 if shift is None else shift[:, :, None, None])

    def without_silu(*given: Any) -> Tensor:
        return right.group_norm(*given[:5], shift=given[6] if len(given) > 6 else None)

    def without_residual(x: Tensor, residual: Tensor | None, *more: Any) -> tuple[Tensor, Tensor]:
        return right.residual_norm(x, None if residual is None else 0 * residual, *more)

    def without_gradient(*given: Any) -> Tensor:
        return right.layer_norm(*given).detach() + 0 * given[0]

    def without_addend(x: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
        return right.modulate(x, factor, None if addend is None else 0 * addend)

    def error(**operations: Any) -> float:
        return self_test_error(right, **operations)

    assert error() < 1e-6
    assert error(geglu=lambda hidden: right.geglu(hidden) * 1.1) == pytest.approx(0.1, rel=1e-3)
    assert error(group_norm=without_silu) > 0.1
    assert error(group_norm=unshifted) > 0.1 and error(residual_norm=without_residual) > 0.1
    assert error(layer_norm=without_gradient) == pytest.approx(1)
    assert error(rms_norm=lambda x, weight, eps: right.rms_norm(x, 1 + 0 * weight, eps)) > 0.1
    assert error(rope=lambda x, table: right.rope(x, table.mT)) > 0.1  # the other way
    assert error(modulate=without_addend) > 0.1
    assert error(modulate=lambda x, factor, addend: right.modulate(x, factor.detach(), addend) + 0 * factor) > 0.1
    assert error(gelu=lambda x, tanh: right.gelu(x, not tanh)) > 1e-4


def test_self_test_measures_the_error_of_arguments_changed_in_place() -> None:
    right = reference_kernels(Kernels, Counter())

    def keep_gradient(weights: Tensor, gradient: Tensor, *more: Any) -> None:
        right.adamw(weights, gradient.clone(), *more)

    def error(**operations: Any) -> float:
        return self_test_error(right, torch.bfloat16, **operations)

    assert error() == 0
    assert error(adamw=keep_gradient) > 1 and error(adamw=lambda *_: None) > 0.5
    assert error(lora_linear_gradients=lambda *_: None) > 0.5
    assert error(lora_conv=lambda output, *more: right.lora_conv(output.clone(), *more)) > 0.5


def test_self_test_is_nan_where_a_result_is() -> None:
    right = reference_kernels(Kernels, Counter())
    error = self_test_error(right, geglu=lambda hidden: right.geglu(hidden) * float("nan"))
    assert error != error


def test_supports_asks_for_the_device_and_the_dtype() -> None:
    hidden = torch.zeros(2, 4)
    assert Kernels("cpu").geglu.supports(hidden) and not Kernels("cuda").geglu.supports(hidden)
    assert not Kernels("cpu").geglu.supports(hidden.double())


def test_group_norm_supports_channels_last_images() -> None:
    norm: Kernel = Kernels("cpu").group_norm
    first = torch.zeros(2, 3, 4, 5)
    last = first.contiguous(memory_format=torch.channels_last)
    assert norm.supports(last) and not norm.supports(first)
    assert not norm.supports(last[:, :, ::2]) and not norm.supports(last.permute(0, 2, 3, 1))
    assert not norm.supports(torch.zeros(2, 3, 1, 1)) and not norm.supports(last.double())
    assert not norm.supports(torch.zeros(2, 3)) and not Kernels("cuda").group_norm.supports(last)


class FakeKernel:
    """In place of a Triton kernel: notes what it is compiled for, and cannot run."""

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


def test_compiling_together_compiles_each_variant_once_and_runs_none() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch's CUDA build on Linux")
    from aclora_core.acceleration.kernels.launch import compiling_together, launch

    kernel, failing, x = FakeKernel(), FakeKernel(fails=True), torch.zeros(4)
    with compiling_together(torch.device("cpu")):
        launch(kernel, (1,), x, 16, 5, 2)
        launch(kernel, (9,), x + 1, 32, 6, 2)  # the same variant: both numbers are multiples of 16
        launch(kernel, (1,), x, 17, 5, 2)
        launch(kernel, (1,), x.double(), 16, 5, 2)
        launch(kernel, (1,), x, 16, 5, 3)
        launch(kernel, (1,), x, 16, 5, 2, num_warps=8)
        launch(failing, (1,), x, 16, 5, 2)
    assert len(kernel.compiled) == 5 and len(failing.compiled) == 1
    assert (torch.float32, 16, 5, 2, {}) in kernel.compiled  # dtypes, so that no tensor was kept
    with pytest.raises(TypeError):  # afterwards kernels are run, and this one cannot
        launch(kernel, (1,), x, 16, 5, 2)


def test_kernels_run_again_after_compiling_together_fails() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch's CUDA build on Linux")
    from aclora_core.acceleration.kernels import launch as launching

    kernel = FakeKernel()
    with pytest.raises(ValueError, match="stop"), launching.compiling_together(torch.device("cpu")):
        launching.launch(kernel, (1,), torch.zeros(1), 16, 5, 2)
        raise ValueError("stop")
    assert launching._compile is None


def test_long_sums_are_left_to_pytorch() -> None:
    ours, half = Kernels("cpu"), torch.float16
    weight, wide = torch.zeros(1280, 1280, dtype=half), torch.zeros(10240, 1280, dtype=half)
    rows, down = torch.zeros(1024, 1280, dtype=half), torch.zeros(16, 1280, dtype=half)

    def supported(x: Tensor, weight: Tensor, rank: int = 16) -> list[bool]:
        downs = [down.expand(16, 1280).repeat(5, 1)[:rank]]
        return [kernel.supports(given, [weight], downs) for kernel, given in zip(both, (x, [x]), strict=True)]

    both = ours.lora_linear, ours.lora_linear_backward
    assert supported(rows, weight) == [True, True] and supported(rows, wide) == [False, False]
    assert supported(rows, weight.t()[:, :100]) == [False, False]  # not contiguous, nor a multiple of 64
    assert supported(rows.float(), weight.float()) == [False, False]
    assert supported(rows, weight, 64) == [True, True] and supported(rows, weight, 65) == [False, False]
    assert ours.lora_linear_gradients.supports(rows, [rows], [down.repeat(4, 1)])
    assert not ours.lora_linear_gradients.supports(rows.expand(17, -1, -1).reshape(-1, 1280), [rows], [down])
    sizes = (16, 64), (16, 128), (4, 64)
    small, large, thin = (torch.zeros(1, count, side, side, dtype=half) for count, side in sizes)
    up = torch.zeros(64, 16, dtype=half)
    assert ours.lora_conv.supports(large, down, up) and not ours.lora_conv.supports(thin, down, up)
    assert ours.lora_conv_gradients.supports(small, small, down)
    assert not ours.lora_conv_gradients.supports(large, large, down)


def test_attention_to_many_keys_is_left_to_the_libraries() -> None:
    attention = Kernels("cpu").short_key_attention
    query, caption, long = (torch.zeros(1, 2, rows, 64, dtype=torch.float16) for rows in (900, 77, 231))
    assert attention.supports(query, caption, caption)
    assert not attention.supports(query, long, long) and not attention.supports(query, caption, long)
    assert not attention.supports(query.float(), caption.float(), caption.float())
    assert not attention.supports(query, caption[:, :1], caption[:, :1])  # heads that share keys


def test_rope_supports_tables_that_broadcast_to_the_input() -> None:
    rope = Kernels("cpu").rope
    x, table = torch.zeros(2, 3, 5, 8), torch.zeros(1, 1, 5, 4, 2, 2)
    assert rope.supports(x, table) and rope.supports(x.half(), table.expand(2, 1, 5, 4, 2, 2))
    for other in (table.double(), table[0], table[:, :, :4], table[..., :1], table.clone().requires_grad_()):
        assert not rope.supports(x, other)
    assert not rope.supports(x[..., :6], table) and not rope.supports(x[0], table)
    assert not rope.supports(x.double(), table) and not rope.supports(x[:, :, :0], table[:, :, :0])


def test_modulate_supports_one_vector_of_each_image_in_one_dtype() -> None:
    modulate = Kernels("cpu").modulate
    x, vector = torch.zeros(2, 5, 8), torch.zeros(2, 1, 8)
    assert all(modulate.supports(x, vector, addend) for addend in (None, vector, x))
    assert modulate.supports(x.half(), vector.half(), vector.half())
    for other in (vector[:1], vector[..., :1], x, vector[0], vector.half(), vector.to("meta")):
        assert not modulate.supports(x, other, None)
        assert other is x or not modulate.supports(x, vector, other)
    assert not modulate.supports(x[:, :0], vector, None) and not modulate.supports(x[0], vector, None)
