"""Optimisation steps: the update, skipped steps, loss scaling, prefetching, checkpoints, evaluation weights."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from aclora_core.acceleration.cuda_graphs import CudaGraphRunner
from aclora_core.adapter.adapter import Layer
from aclora_core.diffusion.batch import Batch
from aclora_core.lora.linear import LinearBranch
from aclora_core.lora.parameters import FlatParameters, LoraLayer
from aclora_core.optim import weight_update
from aclora_core.optim.stepper import Stepper

RATE, DECAY = 0.1, 0.05
CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Bench:
    """A stepper over one layer, with a new loss for each step."""

    weights: FlatParameters
    stepper: Stepper
    losses: list[Loss]

    @property
    def branch(self) -> LoraLayer:
        return self.weights.layers["layer"]

    def step(self, *losses: Loss) -> float:
        self.losses[:] = losses
        nothing = torch.zeros(1)
        return self.stepper.step([Batch(nothing, nothing, nothing, nothing, {}, "one") for _ in losses])

    def moments(self) -> dict[str, Tensor]:
        (state,) = self.stepper.optimizer.state.values()
        return {key: value.clone() for key, value in state.items()}


def bench(max_norm: float = 100.0, dtype: torch.dtype = torch.float32) -> Bench:
    start = {"layer": Layer(torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[4.0, -1.0]]), 2.0)}
    weights, losses = FlatParameters(start, CPU, dtype), []
    leaves = weights.layers["layer"].down.compute, weights.layers["layer"].up.compute
    stepper = Stepper(weights, lambda batch: losses.pop(0)(*leaves), CudaGraphRunner(CPU), RATE, DECAY, max_norm)
    return Bench(weights, stepper, losses)


def squares(down: Tensor, up: Tensor) -> Tensor:
    return down.square().sum() + up.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_step_follows_adamw(dtype: torch.dtype) -> None:
    it = bench(dtype=dtype)
    before = it.branch.lora_down.clone()
    assert it.step(lambda down, up: (down.square().sum() + up.sum()) / 2) == pytest.approx((1 + 4 + 0.25 + 9 + 3) / 2)
    # AdamW's first step: weight decay, then the learning rate times the sign of the gradient.
    torch.testing.assert_close(it.branch.lora_down, before * (1 - RATE * DECAY) - RATE * before.sign())
    torch.testing.assert_close(it.branch.down.compute.detach(), it.branch.lora_down.to(dtype))


def test_many_steps_match_torch_adamw_on_separate_factors() -> None:
    it = bench(max_norm=0.7)
    factors = [it.branch.lora_down.clone().requires_grad_(), it.branch.lora_up.clone().requires_grad_()]
    plain = torch.optim.AdamW(factors, lr=RATE, weight_decay=DECAY)
    for _ in range(50):
        plain.zero_grad()
        squares(*factors).backward()
        torch.nn.utils.clip_grad_norm_(factors, 0.7)
        plain.step()
        it.step(squares)
    torch.testing.assert_close(it.branch.lora_down, factors[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(it.branch.lora_up, factors[1].detach(), rtol=1e-4, atol=1e-5)


def test_two_micro_batches_add_up_to_one_step() -> None:
    split, whole = bench(), bench()
    for _ in range(5):
        value = split.step(lambda down, up: down.square().sum(), lambda down, up: up.square().sum())
        assert value == pytest.approx(whole.step(squares))
    torch.testing.assert_close(split.weights.master, whole.weights.master)


def test_gradients_accumulate_in_float32_whatever_the_model_dtype() -> None:
    """2000 gradients of 1 sum to 2000; in bfloat16 the sum would stop at 256."""
    it = bench(max_norm=1e9, dtype=torch.bfloat16)
    for _ in range(2000):
        it.losses[:] = [lambda down, up: down.sum()]
        it.stepper._gradients._forward_backward(None)
        it.stepper._gradients.to_float32()
    assert torch.equal(it.stepper._gradients.gradient[:4], torch.full((4,), 2000.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_leaves_weights_and_optimizer_state(bad: float, dtype: torch.dtype) -> None:
    it = bench(dtype=dtype)
    it.step(squares)
    weights, moments = it.weights.master.clone(), it.moments()
    for count in (1, 2):
        assert math.isnan(it.step(lambda down, up: squares(down, up) * bad))
        assert it.stepper.skipped_in_a_row == count
    assert torch.equal(it.weights.master, weights)
    for key, value in it.moments().items():
        assert torch.equal(value, moments[key]), key
    assert math.isfinite(it.step(squares))
    assert it.stepper.skipped_in_a_row == 0 and not torch.equal(it.weights.master, weights)


def test_non_finite_gradient_leaves_the_weights_though_the_loss_is_finite() -> None:
    it = bench()
    it.branch.lora_up.zero_()
    weights = it.weights.master.clone()
    # The derivative of √|x| at 0 is infinity · 0.
    assert math.isnan(it.step(lambda down, up: down.sum() + up.abs().sqrt().sum()))
    assert torch.equal(it.weights.master, weights) and not any(value.any() for value in it.moments().values())


def test_large_gradients_are_clipped_to_the_norm_and_small_ones_stay() -> None:
    it = bench(max_norm=0.5)
    it.step(lambda down, up: 1000 * down.sum())
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 0.1 * 0.25))  # 0.5 over four elements
    it.stepper.reset_state([it.branch.lora_down])
    it.step(lambda down, up: 0.001 * down.sum())
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 0.1 * 0.001))


def test_gradients_are_cleared_after_each_step() -> None:
    it = bench()
    for count in range(1, 4):
        it.step(lambda down, up: down.sum())
        torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 1 - 0.9**count))
        assert not it.weights.gradient.any()


def test_reset_state_clears_the_moments_of_the_given_factors_only() -> None:
    it = bench()
    for _ in range(3):
        it.step(squares)
    before = it.moments()
    it.stepper.reset_state([it.branch.lora_down])
    up = it.weights.span(it.branch.lora_up)
    for key in ("exp_avg", "exp_avg_sq"):
        now = it.moments()[key]
        assert not now[:4].any() and before[key][:4].any()
        assert torch.equal(now[up], before[key][up]) and now[up].any()


def test_reset_state_before_the_first_step_is_no_error() -> None:
    it = bench()
    it.stepper.reset_state([it.branch.lora_down])
    assert math.isfinite(it.step(squares))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stepper_resumes_from_a_state_dict(dtype: torch.dtype) -> None:
    it, other = bench(dtype=dtype), bench(dtype=dtype)
    for _ in range(3):
        it.step(squares)
    it.step(lambda down, up: squares(down, up) * math.nan)
    other.weights.master.copy_(it.weights.master)
    other.weights.refresh()
    addresses = [value.data_ptr() for value in other.stepper.optimizer.state_dict()["state"][0].values()]
    other.stepper.load_state_dict(copy.deepcopy(it.stepper.state_dict()))
    assert addresses == [value.data_ptr() for value in other.stepper.optimizer.state_dict()["state"][0].values()]
    assert other.stepper.skipped_in_a_row == 1
    for _ in range(3):
        assert it.step(squares) == other.step(squares)
    assert torch.equal(it.weights.master, other.weights.master)


def test_last_good_weights_are_those_before_the_last_finite_step() -> None:
    """Not those after it: they may be what makes every later loss non-finite."""
    it = bench()
    it.step(squares)
    good = it.weights.master.clone()
    it.step(squares)
    assert not torch.equal(it.weights.master, good)
    for _ in range(3):
        it.step(lambda down, up: squares(down, up) * math.nan)
    it.stepper.restore_last_good()
    assert torch.equal(it.weights.master, good) and torch.equal(it.branch.down.compute.detach(), it.branch.lora_down)


def fixed(loss, dtype: torch.dtype = torch.float32, max_norm: float = 100.0, **more) -> Bench:
    """A bench in which every micro-batch has this loss."""
    it = bench(dtype=dtype)
    leaves = it.branch.down.compute, it.branch.up.compute
    it.stepper = Stepper(it.weights, lambda batch: loss(*leaves), CudaGraphRunner(CPU), RATE, DECAY, max_norm, **more)
    return it


def micro_batches(count: int = 1) -> list[Batch]:
    nothing = torch.zeros(1)
    return [Batch(nothing, nothing, nothing, nothing, {}, "one")] * count


def test_reported_loss_may_differ_from_training_loss() -> None:
    plain, weighted = bench(), fixed(lambda down, up: (3 * squares(down, up), squares(down, up)), max_norm=1e9)
    tripled = fixed(lambda down, up: 3 * squares(down, up), max_norm=1e9)
    assert weighted.stepper.step(micro_batches()) == plain.step(squares)
    tripled.stepper.step(micro_batches())
    assert torch.equal(weighted.weights.master, tripled.weights.master)
    assert torch.equal(weighted.moments()["exp_avg"], tripled.moments()["exp_avg"])


def test_each_step_uses_its_learning_rate() -> None:
    factors = [bench().branch.lora_down.clone().requires_grad_(), bench().branch.lora_up.clone().requires_grad_()]
    plain = torch.optim.AdamW(factors, lr=RATE, weight_decay=DECAY)
    it = fixed(squares)
    for rate in (0.1, 0.05, 0.2, 0.001):
        plain.param_groups[0]["lr"] = rate
        plain.zero_grad()
        squares(*factors).backward()
        plain.step()
        it.stepper.learning_rate = rate
        it.stepper.step(micro_batches())
        assert it.stepper.learning_rate == rate
    torch.testing.assert_close(it.branch.lora_down, factors[0].detach(), rtol=1e-5, atol=1e-6)


def test_tiny_float16_gradients_do_not_underflow() -> None:
    """1e-9 is 0 in float16."""
    it = fixed(lambda down, up: down.float().sum() * 1e-9, torch.float16)
    it.stepper.step(micro_batches())
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 1e-10), rtol=1e-3, atol=0)


def test_a_step_that_overflows_float16_is_repeated_at_a_smaller_scale() -> None:
    calls: list[int] = []

    def loss(down: Tensor, up: Tensor) -> Tensor:
        calls.append(1)
        return down.float().sum() * 10

    it = fixed(loss, torch.float16)
    assert it.stepper.step(micro_batches()) == pytest.approx(25)
    # 10 · 2^16 overflows float16, and so does every half of it down to 10 · 2^13.
    assert len(calls) == 5 and it.stepper._update._scaler.value == 2**12 and it.stepper.skipped_in_a_row == 0
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 1.0))
    expected = 10 * float(it.branch.down.compute.detach().float().sum())
    assert it.stepper.step(micro_batches(3)) == pytest.approx(3 * expected) and len(calls) == 8


def test_a_float16_gradient_that_overflows_at_every_scale_is_skipped() -> None:
    # The derivative of √|x| at 0 is infinity · 0.
    it = fixed(lambda down, up: (up - up.detach()).float().abs().sqrt().sum(), torch.float16)
    weights = it.weights.master.clone()
    assert math.isnan(it.stepper.step(micro_batches())) and it.stepper.skipped_in_a_row == 1
    assert torch.equal(it.weights.master, weights) and it.stepper._update._scaler.value == 1


def test_a_non_finite_float16_loss_leaves_the_scale() -> None:
    it = fixed(lambda down, up: down.float().sum() * math.nan, torch.float16)
    assert math.isnan(it.stepper.step(micro_batches())) and it.stepper._update._scaler.value == 2**16


def test_float16_trains_like_float32() -> None:
    it, exact = fixed(lambda down, up: squares(down.float(), up.float()), torch.float16, 0.7), bench(0.7)
    for _ in range(30):
        it.stepper.step(micro_batches())
        exact.step(squares)
    torch.testing.assert_close(it.weights.master, exact.weights.master, rtol=0.02, atol=0.02)


def test_evaluation_uses_the_ema_and_training_continues_from_the_raw_weights() -> None:
    it, plain = fixed(squares, ema_decay=0.8), fixed(squares)
    expected = it.weights.master.clone()
    for count in range(1, 13):
        it.stepper.step(micro_batches()), plain.stepper.step(micro_batches())
        expected += (1 - min(0.8, (1 + count) / (10 + count))) * (it.weights.master - expected)
        with it.stepper.evaluation_weights():
            torch.testing.assert_close(it.weights.master, expected)
            torch.testing.assert_close(it.branch.down.compute.detach(), it.branch.lora_down)
        assert torch.equal(it.weights.master, plain.weights.master)
    it.stepper.keep_evaluation_weights()
    torch.testing.assert_close(it.weights.master, expected)
    it.weights.master.fill_(7)  # weights that are set afterwards stay, as truncation does
    it.stepper.keep_evaluation_weights()
    with it.stepper.evaluation_weights():
        assert (it.weights.master == 7).all()


def test_training_weights_are_restored_after_an_error() -> None:
    it = fixed(squares, torch.bfloat16, ema_decay=0.9)
    for _ in range(3):
        it.stepper.step(micro_batches())
    before = it.weights.master.clone()
    with pytest.raises(RuntimeError, match="stop"), it.stepper.evaluation_weights():
        assert not torch.equal(it.weights.master, before)
        raise RuntimeError("stop")
    assert torch.equal(it.weights.master, before) and torch.equal(it.weights.compute, before.bfloat16())


def test_last_good_ema_is_that_before_the_last_finite_step() -> None:
    it = fixed(squares, ema_decay=0.8)
    seen = []
    for _ in range(4):
        with it.stepper.evaluation_weights():
            seen.append(it.weights.master.clone())
        it.stepper.step(micro_batches())
    it.stepper.restore_last_good()
    it.stepper.keep_evaluation_weights()
    assert torch.equal(it.weights.master, seen[-1])


def test_a_replaced_layer_is_evaluated_with_its_new_weights() -> None:
    it = fixed(squares, ema_decay=0.99)
    for _ in range(5):
        it.stepper.step(micro_batches())
    it.branch.lora_down.fill_(2)
    it.stepper.restart_ema([it.branch.lora_down, it.branch.lora_up])
    before = it.weights.master.clone()
    with it.stepper.evaluation_weights():
        assert torch.equal(it.weights.master, before)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_resumed_steps_are_bit_identical(optimizer, dtype: torch.dtype) -> None:
    def loss(down: Tensor, up: Tensor) -> Tensor:
        return squares(down.float(), up.float()) * 9

    uninterrupted, interrupted, resumed = (
        fixed(loss, dtype, 0.7, optimizer=optimizer, ema_decay=0.9) for _ in range(3)
    )
    for _ in range(6):
        uninterrupted.stepper.step(micro_batches(2))
        interrupted.stepper.step(micro_batches(2))
    resumed.weights.master.copy_(interrupted.weights.master)
    resumed.weights.refresh()
    resumed.stepper.load_state_dict(interrupted.stepper.state_dict())
    for _ in range(5):
        assert uninterrupted.stepper.step(micro_batches(2)) == resumed.stepper.step(micro_batches(2))
    uninterrupted.stepper.keep_evaluation_weights()
    resumed.stepper.keep_evaluation_weights()
    assert torch.equal(uninterrupted.weights.master, resumed.weights.master)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_steps_match_the_cpu(optimizer, dtype: torch.dtype) -> None:
    """With a changing learning rate, an EMA, two micro-batches a step, and one non-finite step."""
    masters = []
    for device in (CPU, torch.device("cuda")):
        start = {"layer": Layer(torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[4.0, -1.0]]), 2.0)}
        weights = FlatParameters(start, device, dtype)
        branch, graphs = weights.layers["layer"], CudaGraphRunner(device)
        leaves = branch.down.compute, branch.up.compute

        def loss(batch: Batch, leaves: tuple[Tensor, ...] = leaves) -> Tensor:
            return squares(*(leaf.float() for leaf in leaves)) * batch.weight.sum() * 1e3

        more = {"optimizer": optimizer, "ema_decay": 0.9}
        stepper = Stepper(weights, loss, graphs, RATE, DECAY, 0.7, **more)
        nothing, ones = torch.zeros(1), torch.ones(1)
        weights_of = [ones * (math.nan if step == 4 else 1.0) for step in range(13)]
        batches = [Batch(nothing, nothing, nothing, weight, {}, "one") for weight in weights_of]
        for step, (batch, following) in enumerate(itertools.pairwise(batches)):
            stepper.learning_rate = 0.1 / (1 + step)
            upcoming = [following] * 2 if step % 3 else []
            loss_value = stepper.step([batch, batch], lambda upcoming=upcoming: upcoming)
            assert math.isnan(loss_value) == (step == 4)
        assert graphs.active == (device.type == "cuda")
        with stepper.evaluation_weights():
            masters.append(weights.master.cpu().clone())
        masters.append(weights.master.cpu().clone())
    torch.testing.assert_close(masters[:2], masters[2:], rtol=1e-3, atol=1e-4)


class FusedKernels:
    """The fused AdamW kernel in plain PyTorch, with the arguments of acceleration.AdamW."""

    calls = 0

    @classmethod
    def adamw(
        cls, weights, gradient, exp_avg, exp_avg_sq, previous, compute, steps, lr, divisor, skip, betas, decay, eps
    ) -> None:
        cls.calls += 1
        if not skip:
            grad = gradient.float() / divisor
            previous.copy_(weights)
            exp_avg.lerp_(grad, 1 - betas[0])
            exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
            weights.mul_(1 - lr * decay)
            corrected = (exp_avg_sq / (1 - betas[1] ** steps)).sqrt()
            weights.sub_(lr * exp_avg / (1 - betas[0] ** steps) / (corrected + eps))
            compute.copy_(weights)
        gradient.zero_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_update_matches_the_separate_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one and with several micro-batches, non-finite steps, an EMA and a return to the last good weights."""

    def run() -> list[Tensor]:
        it, spoil = bench(dtype=dtype), []
        leaves = it.branch.down.compute, it.branch.up.compute

        def loss(batch: Batch) -> Tensor:
            return squares(*(leaf.float() for leaf in leaves)) * (math.nan if spoil else 1)

        it.stepper = Stepper(it.weights, loss, CudaGraphRunner(CPU), RATE, DECAY, 0.7, ema_decay=0.9)
        for count in (1, 3, 1, 1, 2, 1):
            assert math.isfinite(it.stepper.step(micro_batches(count)))
            spoil.append(1)
            assert math.isnan(it.stepper.step(micro_batches(count)))
            spoil.clear()
        results = [it.weights.master.clone(), it.weights.compute.float()]
        assert not it.weights.gradient.any() and not it.stepper._gradients.gradient.any()
        it.stepper.restore_last_good()
        results.append(it.weights.master.clone())
        it.stepper.keep_evaluation_weights()
        return [*results, it.weights.master.clone()]

    separate = run()
    monkeypatch.setattr(weight_update, "find_kernels", lambda device, dtype, group: FusedKernels)
    FusedKernels.calls = 0
    fused = run()
    assert FusedKernels.calls >= 12
    torch.testing.assert_close(fused, separate, rtol=0.02, atol=0.01)


class AlwaysCaptured(CudaGraphRunner):
    """Claims that every graph is captured, so that micro-batches are prefetched as on a GPU."""

    def is_captured(self, function: object, key: object = ()) -> bool:
        return True


@dataclass
class Runner:
    """A stepper whose loss is multiplied by the weight of its micro-batch."""

    stepper: Stepper
    weights: FlatParameters
    seen: list[float]  # weights of the micro-batches that were computed, in order

    def batch(self, factor: float) -> Batch:
        nothing = torch.zeros(1)
        return Batch(nothing, nothing, nothing, torch.tensor([factor]), {}, "one")


def runner(graphs: type[CudaGraphRunner], dtype: torch.dtype = torch.float32) -> Runner:
    it, seen = bench(dtype=dtype), []
    leaves = it.branch.down.compute, it.branch.up.compute

    def loss(batch: Batch) -> Tensor:
        seen.append(float(batch.weight))
        return squares(*(leaf.float() for leaf in leaves)) * batch.weight.sum()

    return Runner(Stepper(it.weights, loss, graphs(CPU), RATE, DECAY, 0.7), it.weights, seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prefetched_steps_are_bit_identical(dtype: torch.dtype) -> None:
    """One to three micro-batches, a non-finite one, and in float16 overflows, which discard the prefetched one."""
    factors = [[1.0], [2.0, 0.5], [math.nan], [3e3], [0.1, 3e3, 1.0], [1.0]]
    results = []
    for graphs in (CudaGraphRunner, AlwaysCaptured):
        it = runner(graphs, dtype)
        steps = [[it.batch(factor) for factor in step] for step in factors]
        losses = [
            it.stepper.step(step, lambda following=following: following)
            for step, following in itertools.zip_longest(steps, steps[1:], fillvalue=[])
        ]
        results.append((losses, it.weights.master.clone(), it.seen))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0, equal_nan=True)
    plain, prefetched = results[0][2], results[1][2]
    assert len(prefetched) == len(plain) if dtype != torch.float16 else len(prefetched) > len(plain)


def test_a_prefetched_batch_is_discarded_after_a_weight_change_or_for_another_step() -> None:
    for change in (True, False):
        it, plain = runner(AlwaysCaptured), runner(CudaGraphRunner)
        first, prefetched, other = (it.batch(factor) for factor in (1.0, 5.0, 2.0))
        it.stepper.step([first], lambda prefetched=prefetched: [prefetched])
        plain.stepper.step([first])
        if change:
            for each in (it, plain):
                each.weights.master.mul_(0.5)
                each.weights.refresh()
            it.stepper.clear_gradients()
        following = prefetched if change else other
        assert it.stepper.step([following]) == plain.stepper.step([following])
        assert torch.equal(it.weights.master, plain.weights.master)
        assert it.seen == [1.0, 5.0, 5.0 if change else 2.0]


def test_restore_last_good_discards_the_prefetched_batch() -> None:
    it = runner(AlwaysCaptured)
    it.stepper.step([it.batch(1.0)], lambda: [it.batch(5.0)])
    it.stepper.restore_last_good()
    assert not it.stepper._gradients.gradient.any() and it.stepper._gradients._prefetched is None


ON_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_reach_text_encoders_that_learn(dtype: torch.dtype, device: str) -> None:
    """On CUDA through a captured graph, whose input is the encoded caption."""
    place = torch.device(device)
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    start = {name: Layer(random(2, 4) / 2, random(4, 2) / 2, 2.0) for name in ("text", "network")}
    weights = FlatParameters(start, place, dtype)
    text, network = weights.layers.values()
    word = random(3, 4).to(place, dtype)

    def through(branch: LoraLayer, x: Tensor) -> Tensor:
        return LinearBranch.apply(torch.zeros_like(x), x, branch.down.compute, branch.up.compute, branch)

    stepper = Stepper(
        weights,
        lambda batch: through(network, batch.conditioning).float().square().mean(),
        CudaGraphRunner(place),
        RATE,
        0.0,
        1e9,
        optimizer="SGD",
    )
    factors = [part.master.clone().requires_grad_() for branch in (text, network) for part in (branch.down, branch.up)]
    plain = torch.optim.SGD(factors, lr=RATE, momentum=0.9)
    nothing = torch.zeros(1)
    for _ in range(3):
        plain.zero_grad()
        encoded = word.float() @ factors[0].t() @ factors[1].t()
        (encoded @ factors[2].t() @ factors[3].t()).square().mean().backward()
        plain.step()
        stepper.step([Batch(nothing, nothing, nothing, nothing, through(text, word).cpu(), "one")])
    assert stepper.graphs.active == (device == "cuda")
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for part, factor in zip((text.down, text.up, network.down, network.up), factors, strict=True):
        torch.testing.assert_close(part.master, factor.detach(), **close)
