"""One optimisation step: it follows AdamW, leaves out what is not finite, and forgets moments when told to."""

import math

import pytest
import torch
from torch import Tensor

from aclora_core.stepping import Stepper

RATE, DECAY = 0.1, 0.05


def made(max_norm: float = 100.0) -> tuple[Stepper, Tensor, Tensor]:
    a = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    b = torch.tensor([4.0, -1.0], requires_grad=True)
    return Stepper([a, b], RATE, DECAY, max_norm), a, b


def moments(stepper: Stepper, factor: Tensor) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in stepper.optimizer.state[factor].items()}


def test_the_first_step_is_adamws() -> None:
    stepper, a, b = made()
    before = a.detach().clone()
    value = stepper.step(lambda: (a.square().sum() + b.sum()) / 2)
    assert value == pytest.approx((1 + 4 + 0.25 + 9 + 3) / 2)
    # AdamW's first step: decay, then the rate along the sign of the gradient.
    torch.testing.assert_close(a.detach(), before * (1 - RATE * DECAY) - RATE * before.sign())


def test_many_steps_find_the_minimum() -> None:
    stepper, a, b = made()
    goal = torch.tensor([0.3, -0.2])
    losses = [stepper.step(lambda: (a - goal).square().sum() + (b - goal).square().sum()) for _ in range(200)]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_weights_and_moments(bad: float) -> None:
    stepper, a, b = made()
    stepper.step(lambda: a.square().sum() + b.square().sum())
    weights, kept = a.detach().clone(), moments(stepper, a)
    for count in (1, 2):
        assert math.isnan(stepper.step(lambda: (a.square().sum() + b.square().sum()) * bad))
        assert stepper.skipped_in_a_row == count
    assert torch.equal(a.detach(), weights) and torch.isfinite(b).all()
    for key, value in moments(stepper, a).items():
        assert torch.equal(value, kept[key]), key
    assert math.isfinite(stepper.step(lambda: a.square().sum() + b.square().sum()))
    assert stepper.skipped_in_a_row == 0 and not torch.equal(a.detach(), weights)


def test_a_gradient_that_is_not_finite_leaves_the_weights_though_the_loss_is() -> None:
    stepper, a, b = made()
    with torch.no_grad():
        b.zero_()
    weights = a.detach().clone()
    assert math.isnan(stepper.step(lambda: a.sum() + b.abs().sqrt().sum()))  # √|x| has the slope infinity · 0 at 0
    assert torch.equal(a.detach(), weights) and not b.any() and not stepper.optimizer.state


def test_long_gradients_are_shortened_to_the_norm() -> None:
    stepper, a, b = made(max_norm=0.5)
    stepper.step(lambda: 1000 * (a.square().sum() + b.square().sum()))
    norm = torch.cat([a.grad.flatten(), b.grad.flatten()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-3)
    stepper.step(lambda: 0.001 * a.sum())
    assert float(a.grad.norm()) == pytest.approx(0.002, rel=1e-3)  # a short one stays as it is


def test_gradients_do_not_pile_up_from_step_to_step() -> None:
    stepper, a, b = made()
    for _ in range(3):
        stepper.step(lambda: a.sum())
    assert torch.equal(a.grad, torch.ones(2, 2)) and b.grad is None


def test_forget_clears_the_moments_of_the_named_factors_only() -> None:
    stepper, a, b = made()
    for _ in range(3):
        stepper.step(lambda: a.square().sum() + b.square().sum())
    kept = moments(stepper, b)
    stepper.forget([a])
    assert all(not value.any() for value in moments(stepper, a).values())
    for key, value in moments(stepper, b).items():
        assert torch.equal(value, kept[key]), key


def test_after_forgetting_a_factor_steps_as_a_new_one() -> None:
    stepper, a, b = made()
    for _ in range(5):
        stepper.step(lambda: -1000 * a.sum())
    stepper.forget([a])
    before = a.detach().clone()
    stepper.step(lambda: a.sum())
    torch.testing.assert_close(a.detach(), before * (1 - RATE * DECAY) - RATE)


def test_forgetting_before_the_first_step_is_no_error() -> None:
    stepper, a, _ = made()
    stepper.forget([a])
    assert math.isfinite(stepper.step(lambda: a.square().sum()))
