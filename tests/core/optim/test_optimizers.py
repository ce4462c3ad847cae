"""Each optimizer over the flat weights, against the library's own on the factors; forgetting, state, and the rate."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from aclora_core.adapter.adapter import Layer
from aclora_core.lora.parameters import FlatParameters
from aclora_core.optim import optimizers
from aclora_core.optim.flat_optimizer import FlatOptimizer
from aclora_core.optim.optimizers import check_installed

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
    """An adapter whose factors are to become a given one's."""

    weights: FlatParameters
    gradient: Tensor
    updater: FlatOptimizer
    goal: Tensor

    def step(self) -> float:
        self.gradient.copy_(self.weights.master - self.goal)
        loss = float(self.gradient.square().sum() / 2)
        self.updater.skip.zero_()
        with torch.no_grad():
            self.updater.step()
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
    updater = FlatOptimizer(name, weights, gradient, RATES[name] if rate is None else rate, DECAY)
    return Bench(weights, gradient, updater, FlatParameters(random_layers(1), CPU).master)


def of_torch(name: str, factors: list[Tensor]) -> torch.optim.Optimizer:
    """The library's own, told of each factor."""
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
def test_each_does_what_its_library_does_on_the_factors(name: str) -> None:
    it = bench(name)
    factors = [factor.clone().flatten(1).requires_grad_() for factor in it.factors()]
    wanted = FlatParameters(random_layers(1), CPU).layers.values()
    goals = [factor.flatten(1) for branch in wanted for factor in (branch.lora_down, branch.lora_up)]
    plain = of_torch(name, factors)
    for _ in range(40):
        it.step()
        for factor, goal in zip(factors, goals, strict=True):
            factor.grad = factor.detach() - goal
        plain.step()
    for found, expected in zip(it.factors(), factors, strict=True):
        torch.testing.assert_close(found.flatten(1), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_each_comes_closer_to_the_goal(name: str) -> None:
    it = bench(name)
    losses = [it.step() for _ in range(300)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ALL)
def test_a_step_that_is_skip_changes_nothing(name: str) -> None:
    it = bench(name)
    for _ in range(3):
        it.step()
    before, state = it.weights.master.clone(), copied(it.updater.state_dict())
    it.gradient.fill_(1)
    it.updater.skip.fill_(1)
    it.updater.step()
    assert torch.equal(it.weights.master, before)
    assert_same(it.updater.state_dict(), state)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_divided(name: str) -> None:
    one, other = bench(name), bench(name)
    for _ in range(5):
        one.step()
        other.gradient.copy_(8 * (other.weights.master - other.goal))
        other.updater.skip.zero_()
        other.updater.divisor.fill_(8)
        with torch.no_grad():
            other.updater.step()
    torch.testing.assert_close(other.weights.master, one.weights.master, rtol=1e-5, atol=1e-6)


def copied(state):
    """A deep copy, with tensors of their own."""
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
def test_another_one_goes_on_bit_for_bit(name: str, done: int) -> None:
    whole, begun, gone_on = bench(name), bench(name), bench(name)
    for _ in range(done):
        whole.step(), begun.step()
    gone_on.step()  # what it knew before is gone
    gone_on.weights.master.copy_(begun.weights.master)
    gone_on.updater.load_state_dict(copied(begun.updater.state_dict()))
    for _ in range(9):
        assert whole.step() == gone_on.step()
    assert torch.equal(whole.weights.master, gone_on.weights.master)


@pytest.mark.parametrize("name", ALL)
def test_what_was_forgotten_is_as_at_the_start_and_the_rest_is_kept(name: str) -> None:
    """A step with no gradient moves a factor by its moments alone: the forgotten one stays, but for its decay."""
    it = bench(name)
    for _ in range(20):
        it.step()
    branch = it.weights.layers["linear"]
    down, up = it.weights.span(branch.lora_down), it.weights.span(branch.lora_up)
    branch.lora_down.fill_(0.5)
    it.updater.reset_state([down])
    before = it.weights.master.clone()
    it.gradient.zero_()
    it.updater.skip.zero_()
    with torch.no_grad():
        it.updater.step()
    moved = it.weights.master - before
    decay = RATES[name] * DECAY * it.updater.learning_rate / RATES[name] * 1.01 + 1e-7
    assert (moved[down].abs() <= decay * 0.5 + 1e-7).all()
    assert name == "Adafactor" or (moved[up].abs() > 1.5 * decay * before[up].abs()).any()


@pytest.mark.parametrize("name", ALL)
def test_forgetting_before_the_first_step_is_no_error(name: str) -> None:
    it = bench(name)
    it.updater.reset_state([it.weights.span(factor) for factor in it.factors()])
    assert it.step() == bench(name).step()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", ALL[4]])
def test_the_rate_can_be_changed_between_steps(name: str) -> None:
    it, still = bench(name), bench(name)
    it.step(), still.step()
    assert it.updater.learning_rate == RATES[name] and torch.equal(it.weights.master, still.weights.master)
    before = it.weights.master.clone()
    it.updater.learning_rate = 1e-12
    it.step()
    assert it.updater.learning_rate == 1e-12
    torch.testing.assert_close(it.weights.master, before, rtol=0, atol=1e-6)


@needs("prodigyopt")
def test_prodigy_tells_the_rate_that_it_found() -> None:
    it = bench("Prodigy")
    assert it.updater.learning_rate == pytest.approx(1e-6)
    for _ in range(60):
        it.step()
    assert 1e-3 < it.updater.learning_rate < 10


@needs("schedulefree")
def test_schedule_free_shows_its_average_and_goes_on_from_where_it_was() -> None:
    it, plain = bench("AdamWScheduleFree"), bench("AdamWScheduleFree")
    for _ in range(10):
        it.step(), plain.step()
    before = it.weights.master.clone()
    it.updater.eval_mode()
    shown = it.weights.master.clone()
    # y = β x + (1 − β) z, so the shown x is y moved away from z
    z = it.updater.state_dict()["moments"]["0"]["z"]
    torch.testing.assert_close(0.9 * shown + 0.1 * z, before, rtol=1e-5, atol=1e-6)
    assert (shown - before).abs().max() > 1e-3
    it.updater.train_mode()
    it.weights.master.copy_(before)
    assert it.step() == plain.step() and torch.equal(it.weights.master, plain.weights.master)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_what_a_graph_has_to_take_back_is_all_that_a_step_changes(name: str) -> None:
    it = bench(name)
    state = it.updater.state_dict()["moments"]["0"]
    assert it.updater.on_device and {id(t) for t in it.updater.tensors()} == {id(t) for t in state.values()}


def test_the_others_are_not_recorded() -> None:
    it = bench("Adafactor")
    assert not it.updater.on_device and it.updater.tensors() == []


@pytest.mark.parametrize("name", ["Prodigy", "AdamWScheduleFree", "AdamW8bit"])
def test_a_missing_library_is_named_with_what_to_do(name, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    look: Callable[[str], None] = found.append
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", look)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs the package (\w+), .*pip install \1\).*AdamW\.$"):
        check_installed(name)
    assert found
    check_installed("AdamW")


@needs("bitsandbytes")
def test_states_of_eight_bits_are_forgotten_too() -> None:
    """From 4096 numbers on they have eight bits; 0 is one of them."""
    weights = FlatParameters({"one": Layer(torch.randn(16, 320), torch.randn(320, 16), 8.0)}, CPU)
    gradient = torch.ones_like(weights.master)
    updater = FlatOptimizer("AdamW8bit", weights, gradient, 0.01, 0.0)
    with torch.no_grad():
        updater.step()
        before = weights.master.clone()
        branch = weights.layers["one"]
        down, up = weights.span(branch.lora_down), weights.span(branch.lora_up)
        updater.reset_state([down])
        gradient.zero_()
        updater.step()
    assert updater.state_dict()["moments"]["0"]["state1"].dtype == torch.uint8
    assert torch.equal(weights.master[down], before[down]) and (weights.master[up] != before[up]).all()
