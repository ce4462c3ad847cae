"""Each optimizer on the flat weights, against its library on separate factors; reset, state and learning rate."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import Tensor

from aclora_core.adapter.adapter import Layer
from aclora_core.config import OptimizerName
from aclora_core.lora.parameters import FlatParameters
from aclora_core.optim import optimizers
from aclora_core.optim.flat_optimizer import FlatOptimizer
from aclora_core.optim.optimizers import OPTIMIZERS, check_installed

CPU = torch.device("cpu")


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install {package}")


ALL = [
    "AdamW",
    "Adafactor",
    "SGD",
    pytest.param("Prodigy", marks=needs("prodigyopt")),
    pytest.param("AdamWScheduleFree", marks=needs("schedulefree")),
    pytest.param("AdamW8bit", marks=needs("bitsandbytes")),
]
RATES = {"AdamW": 0.01, "Adafactor": 0.01, "SGD": 0.1, "Prodigy": 1.0, "AdamWScheduleFree": 0.02, "AdamW8bit": 0.01}
DECAY = 0.02


@dataclass
class Bench:
    """An adapter that is trained towards the weights of another."""

    weights: FlatParameters
    gradient: Tensor
    optimizer: FlatOptimizer
    goal: Tensor

    def step(self) -> float:
        self.gradient.copy_(self.weights.master - self.goal)
        loss = float(self.gradient.square().sum() / 2)
        self.optimizer.skip.zero_()
        with torch.no_grad():
            self.optimizer.step()
        return loss

    def factors(self) -> list[Tensor]:
        return [factor for branch in self.weights.layers.values() for factor in (branch.lora_down, branch.lora_up)]


def random_layers(seed: int) -> dict[str, Layer]:
    generator = torch.Generator().manual_seed(seed)

    def layer(out: int, inputs: tuple[int, ...]) -> Layer:
        ups = (1 for _ in inputs[1:])
        return Layer(torch.randn(3, *inputs, generator=generator), torch.randn(out, 3, *ups, generator=generator), 3.0)

    return {"linear": layer(5, (7,)), "convolution": layer(4, (6, 3, 3))}


def bench(name, rate: float | None = None) -> Bench:
    weights = FlatParameters(random_layers(0), CPU)
    gradient = torch.zeros_like(weights.master)
    optimizer = FlatOptimizer(name, weights, gradient, RATES[name] if rate is None else rate, DECAY)
    return Bench(weights, gradient, optimizer, FlatParameters(random_layers(1), CPU).master)


def library_optimizer(name: str, factors: list[Tensor]) -> torch.optim.Optimizer:
    """The library's optimizer on separate factors."""
    rate = RATES[name]
    if name == "Adafactor":
        return torch.optim.Adafactor(factors, lr=rate, weight_decay=DECAY, eps=(None, 1.0), foreach=False)
    if name == "SGD":
        return torch.optim.SGD(factors, lr=rate, momentum=0.9, weight_decay=DECAY)
    if name == "Prodigy":
        more = {"use_bias_correction": True, "safeguard_warmup": True}
        return importlib.import_module("prodigyopt").Prodigy(factors, lr=rate, weight_decay=DECAY, **more)
    if name == "AdamWScheduleFree":
        made = importlib.import_module("schedulefree").AdamWScheduleFree(factors, lr=rate, weight_decay=DECAY)
        made.train()
        return made
    return torch.optim.AdamW(factors, lr=rate, weight_decay=DECAY)


@pytest.mark.parametrize("name", ALL[:-1])
def test_each_optimizer_matches_its_library_on_separate_factors(name: str) -> None:
    it = bench(name)
    factors = [factor.clone().flatten(1).requires_grad_() for factor in it.factors()]
    wanted = FlatParameters(random_layers(1), CPU).layers.values()
    goals = [factor.flatten(1) for branch in wanted for factor in (branch.lora_down, branch.lora_up)]
    plain = library_optimizer(name, factors)
    for _ in range(40):
        it.step()
        for factor, goal in zip(factors, goals, strict=True):
            factor.grad = factor.detach() - goal
        plain.step()
    for found, expected in zip(it.factors(), factors, strict=True):
        torch.testing.assert_close(found.flatten(1), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_each_optimizer_reduces_the_loss(name: str) -> None:
    it = bench(name)
    losses = [it.step() for _ in range(300)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ALL)
def test_a_skipped_step_changes_nothing(name: str) -> None:
    it = bench(name)
    for _ in range(3):
        it.step()
    before, state = it.weights.master.clone(), copied(it.optimizer.state_dict())
    it.gradient.fill_(1)
    it.optimizer.skip.fill_(1)
    it.optimizer.step()
    assert torch.equal(it.weights.master, before)
    assert_same(it.optimizer.state_dict(), state)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_divided_by_the_divisor(name: str) -> None:
    one, other = bench(name), bench(name)
    for _ in range(5):
        one.step()
        other.gradient.copy_(8 * (other.weights.master - other.goal))
        other.optimizer.skip.zero_()
        other.optimizer.divisor.fill_(8)
        with torch.no_grad():
            other.optimizer.step()
    torch.testing.assert_close(other.weights.master, one.weights.master, rtol=1e-5, atol=1e-6)


def copied(state):
    """A deep copy."""
    if isinstance(state, Tensor):
        return state.clone()
    return {key: copied(value) for key, value in state.items()} if isinstance(state, dict) else state


def assert_same(found, expected) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("done", [0, 1, 7])
def test_resumed_optimizers_are_bit_identical(name: str, done: int) -> None:
    uninterrupted, interrupted, resumed = bench(name), bench(name), bench(name)
    for _ in range(done):
        uninterrupted.step()
        interrupted.step()
    resumed.step()  # this state is to be overwritten
    resumed.weights.master.copy_(interrupted.weights.master)
    resumed.optimizer.load_state_dict(copied(interrupted.optimizer.state_dict()))
    for _ in range(9):
        assert uninterrupted.step() == resumed.step()
    assert torch.equal(uninterrupted.weights.master, resumed.weights.master)


@pytest.mark.parametrize("name", ALL)
def test_reset_state_clears_the_given_factors_and_keeps_the_rest(name: str) -> None:
    """A step without gradient moves a factor by its moments alone: the reset one stays, but for weight decay."""
    it = bench(name)
    for _ in range(20):
        it.step()
    branch = it.weights.layers["linear"]
    down, up = it.weights.span(branch.lora_down), it.weights.span(branch.lora_up)
    branch.lora_down.fill_(0.5)
    it.optimizer.reset_state([down])
    before = it.weights.master.clone()
    it.gradient.zero_()
    it.optimizer.skip.zero_()
    with torch.no_grad():
        it.optimizer.step()
    moved = it.weights.master - before
    decay = RATES[name] * DECAY * it.optimizer.learning_rate / RATES[name] * 1.01 + 1e-7
    assert (moved[down].abs() <= decay * 0.5 + 1e-7).all()
    assert name == "Adafactor" or (moved[up].abs() > 1.5 * decay * before[up].abs()).any()


@pytest.mark.parametrize("name", ALL)
def test_reset_state_before_the_first_step_is_no_error(name: str) -> None:
    it = bench(name)
    it.optimizer.reset_state([it.weights.span(factor) for factor in it.factors()])
    assert it.step() == bench(name).step()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", ALL[4]])
def test_the_learning_rate_can_change_between_steps(name: str) -> None:
    it, still = bench(name), bench(name)
    it.step(), still.step()
    assert it.optimizer.learning_rate == RATES[name] and torch.equal(it.weights.master, still.weights.master)
    before = it.weights.master.clone()
    it.optimizer.learning_rate = 1e-12
    it.step()
    assert it.optimizer.learning_rate == 1e-12
    torch.testing.assert_close(it.weights.master, before, rtol=0, atol=1e-6)


@needs("prodigyopt")
def test_prodigy_reports_its_estimated_learning_rate() -> None:
    it = bench("Prodigy")
    assert it.optimizer.learning_rate == pytest.approx(1e-6)
    for _ in range(60):
        it.step()
    assert 1e-3 < it.optimizer.learning_rate < 10


@needs("schedulefree")
def test_schedule_free_evaluates_its_average_and_continues_from_its_training_weights() -> None:
    it, plain = bench("AdamWScheduleFree"), bench("AdamWScheduleFree")
    for _ in range(10):
        it.step(), plain.step()
    before = it.weights.master.clone()
    it.optimizer.eval_mode()
    shown = it.weights.master.clone()
    # y = β x + (1 − β) z, so the shown x is y moved away from z
    z = it.optimizer.state_dict()["moments"]["0"]["z"]
    torch.testing.assert_close(0.9 * shown + 0.1 * z, before, rtol=1e-5, atol=1e-6)
    assert (shown - before).abs().max() > 1e-3
    it.optimizer.train_mode()
    it.weights.master.copy_(before)
    assert it.step() == plain.step() and torch.equal(it.weights.master, plain.weights.master)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_tensors_lists_all_state_that_a_captured_step_changes(name: str) -> None:
    it = bench(name)
    state = it.optimizer.state_dict()["moments"]["0"]
    assert it.optimizer.on_device and {id(t) for t in it.optimizer.tensors()} == {id(t) for t in state.values()}


def test_every_name_has_a_row_in_the_registry() -> None:
    assert list(OPTIMIZERS) == list(get_args(OptimizerName))


def test_optimizers_that_are_not_on_device_list_no_tensors() -> None:
    it = bench("Adafactor")
    assert not it.optimizer.on_device and it.optimizer.tensors() == []


@pytest.mark.parametrize("name", ["Prodigy", "AdamWScheduleFree", "AdamW8bit"])
def test_a_missing_package_is_named_with_how_to_install_it(name, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    look: Callable[[str], None] = found.append
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", look)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs the package (\w+), .*pip install \1\).*AdamW\.$"):
        check_installed(name)
    assert found
    check_installed("AdamW")


@needs("bitsandbytes")
def test_reset_state_clears_8_bit_states() -> None:
    """States of 4096 elements and more have 8 bits, and a code that means 0."""
    weights = FlatParameters({"one": Layer(torch.randn(16, 320), torch.randn(320, 16), 8.0)}, CPU)
    gradient = torch.ones_like(weights.master)
    optimizer = FlatOptimizer("AdamW8bit", weights, gradient, 0.01, 0.0)
    with torch.no_grad():
        optimizer.step()
        before = weights.master.clone()
        branch = weights.layers["one"]
        down, up = weights.span(branch.lora_down), weights.span(branch.lora_up)
        optimizer.reset_state([down])
        gradient.zero_()
        optimizer.step()
    assert optimizer.state_dict()["moments"]["0"]["state1"].dtype == torch.uint8
    assert torch.equal(weights.master[down], before[down]) and (weights.master[up] != before[up]).all()
