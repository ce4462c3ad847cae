"""One optimisation step: it follows AdamW, leaves out what is not finite, and forgets moments when told to."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from aclora_core.adapter_file import Layer
from aclora_core.adapter_weights import AdapterWeights, Branch
from aclora_core.batches import Batch
from aclora_core.graphs import Graphs
from aclora_core.stepping import Stepper

RATE, DECAY = 0.1, 0.05
CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Bench:
    """A stepper over one layer; its loss is given anew for each step."""

    weights: AdapterWeights
    stepper: Stepper
    losses: list[Loss]

    @property
    def branch(self) -> Branch:
        return self.weights.branches["layer"]

    def step(self, *losses: Loss) -> float:
        self.losses[:] = losses
        nothing = torch.zeros(1)
        return self.stepper.step([Batch(nothing, nothing, nothing, nothing, {}, "one") for _ in losses])

    def moments(self) -> dict[str, Tensor]:
        (state,) = self.stepper.optimizer.state.values()
        return {key: value.clone() for key, value in state.items()}


def bench(max_norm: float = 100.0, dtype: torch.dtype = torch.float32) -> Bench:
    start = {"layer": Layer(torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[4.0, -1.0]]), 2.0)}
    weights, losses = AdapterWeights(start, CPU, dtype), []
    leaves = weights.branches["layer"].down.leaf, weights.branches["layer"].up.leaf
    stepper = Stepper(weights, lambda batch: losses.pop(0)(*leaves), Graphs(CPU), RATE, DECAY, max_norm)
    return Bench(weights, stepper, losses)


def squares(down: Tensor, up: Tensor) -> Tensor:
    return down.square().sum() + up.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_is_adamws(dtype: torch.dtype) -> None:
    it = bench(dtype=dtype)
    before = it.branch.lora_down.clone()
    assert it.step(lambda down, up: (down.square().sum() + up.sum()) / 2) == pytest.approx((1 + 4 + 0.25 + 9 + 3) / 2)
    # AdamW's first step: decay, then the rate along the sign of the gradient.
    torch.testing.assert_close(it.branch.lora_down, before * (1 - RATE * DECAY) - RATE * before.sign())
    torch.testing.assert_close(it.branch.down.leaf.detach(), it.branch.lora_down.to(dtype))


def test_many_steps_are_those_of_torch_on_the_factors_themselves() -> None:
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


def test_two_batches_of_a_step_add_up_to_one() -> None:
    apart, together = bench(), bench()
    for _ in range(5):
        value = apart.step(lambda down, up: down.square().sum(), lambda down, up: up.square().sum())
        assert value == pytest.approx(together.step(squares))
    torch.testing.assert_close(apart.weights.master, together.weights.master)


def test_batches_add_up_in_float32_whatever_the_models_type() -> None:
    """Two thousand gradients of 1 are 2000; in bfloat16 their sum would stick at 256."""
    it = bench(max_norm=1e9, dtype=torch.bfloat16)
    for _ in range(2000):
        it.losses[:] = [lambda down, up: down.sum()]
        it.stepper._accumulate(None)
    assert torch.equal(it.stepper._gradient[:4], torch.full((4,), 2000.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_weights_and_moments(bad: float, dtype: torch.dtype) -> None:
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


def test_a_gradient_that_is_not_finite_leaves_the_weights_though_the_loss_is() -> None:
    it = bench()
    it.branch.lora_up.zero_()
    weights = it.weights.master.clone()
    # √|x| has the slope infinity · 0 at 0.
    assert math.isnan(it.step(lambda down, up: down.sum() + up.abs().sqrt().sum()))
    assert torch.equal(it.weights.master, weights) and not any(value.any() for value in it.moments().values())


def test_long_gradients_are_shortened_to_the_norm_and_short_ones_stay() -> None:
    it = bench(max_norm=0.5)
    it.step(lambda down, up: 1000 * down.sum())
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 0.1 * 0.25))  # 0.5 over four numbers
    it.stepper.forget([it.branch.lora_down])
    it.step(lambda down, up: 0.001 * down.sum())
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 0.1 * 0.001))


def test_gradients_do_not_pile_up_from_step_to_step() -> None:
    it = bench()
    for count in range(1, 4):
        it.step(lambda down, up: down.sum())
        torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 1 - 0.9**count))
        assert not it.weights.gradient.any()


def test_forget_clears_the_moments_of_the_named_factors_only() -> None:
    it = bench()
    for _ in range(3):
        it.step(squares)
    before = it.moments()
    it.stepper.forget([it.branch.lora_down])
    up = it.weights.span(it.branch.lora_up)
    for key in ("exp_avg", "exp_avg_sq"):
        now = it.moments()[key]
        assert not now[:4].any() and before[key][:4].any()
        assert torch.equal(now[up], before[key][up]) and now[up].any()


def test_forgetting_before_the_first_step_is_no_error() -> None:
    it = bench()
    it.stepper.forget([it.branch.lora_down])
    assert math.isfinite(it.step(squares))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stepper_goes_on_where_another_stood(dtype: torch.dtype) -> None:
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


def test_the_last_good_weights_are_those_whose_loss_was_finite() -> None:
    """Not those that came of it: they may be what spoils every later loss."""
    it = bench()
    it.step(squares)
    good = it.weights.master.clone()
    it.step(squares)
    assert not torch.equal(it.weights.master, good)
    for _ in range(3):
        it.step(lambda down, up: squares(down, up) * math.nan)
    it.stepper.restore_last_good()
    assert torch.equal(it.weights.master, good) and torch.equal(it.branch.down.leaf.detach(), it.branch.lora_down)
