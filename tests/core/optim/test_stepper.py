"""One optimisation step: it follows AdamW, leaves out what is not finite, and forgets moments when told to."""

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
from aclora_core.optim.stepper import Stepper

RATE, DECAY = 0.1, 0.05
CPU = torch.device("cpu")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Bench:
    """A stepper over one layer; its loss is given anew for each step."""

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
def test_the_first_step_is_adamws(dtype: torch.dtype) -> None:
    it = bench(dtype=dtype)
    before = it.branch.lora_down.clone()
    assert it.step(lambda down, up: (down.square().sum() + up.sum()) / 2) == pytest.approx((1 + 4 + 0.25 + 9 + 3) / 2)
    # AdamW's first step: decay, then the rate along the sign of the gradient.
    torch.testing.assert_close(it.branch.lora_down, before * (1 - RATE * DECAY) - RATE * before.sign())
    torch.testing.assert_close(it.branch.down.compute.detach(), it.branch.lora_down.to(dtype))


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
        it.stepper._add_gradients()
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
    assert torch.equal(it.weights.master, good) and torch.equal(it.branch.down.compute.detach(), it.branch.lora_down)


def fixed(loss, dtype: torch.dtype = torch.float32, max_norm: float = 100.0, **more) -> Bench:
    """A bench whose every batch has this loss."""
    it = bench(dtype=dtype)
    leaves = it.branch.down.compute, it.branch.up.compute
    it.stepper = Stepper(it.weights, lambda batch: loss(*leaves), CudaGraphRunner(CPU), RATE, DECAY, max_norm, **more)
    return it


def some(count: int = 1) -> list[Batch]:
    nothing = torch.zeros(1)
    return [Batch(nothing, nothing, nothing, nothing, {}, "one")] * count


def test_what_is_told_need_not_be_what_is_descended() -> None:
    plain, weighted = bench(), fixed(lambda down, up: (3 * squares(down, up), squares(down, up)), max_norm=1e9)
    tripled = fixed(lambda down, up: 3 * squares(down, up), max_norm=1e9)
    assert weighted.stepper.step(some()) == plain.step(squares)
    tripled.stepper.step(some())
    assert torch.equal(weighted.weights.master, tripled.weights.master)
    assert torch.equal(weighted.moments()["exp_avg"], tripled.moments()["exp_avg"])


def test_each_step_has_its_learning_rate() -> None:
    factors = [bench().branch.lora_down.clone().requires_grad_(), bench().branch.lora_up.clone().requires_grad_()]
    plain = torch.optim.AdamW(factors, lr=RATE, weight_decay=DECAY)
    it = fixed(squares)
    for rate in (0.1, 0.05, 0.2, 0.001):
        plain.param_groups[0]["lr"] = rate
        plain.zero_grad()
        squares(*factors).backward()
        plain.step()
        it.stepper.learning_rate = rate
        it.stepper.step(some())
        assert it.stepper.learning_rate == rate
    torch.testing.assert_close(it.branch.lora_down, factors[0].detach(), rtol=1e-5, atol=1e-6)


def test_tiny_gradients_of_float16_are_kept() -> None:
    """1e-9 is 0 in float16."""
    it = fixed(lambda down, up: down.float().sum() * 1e-9, torch.float16)
    it.stepper.step(some())
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 1e-10), rtol=1e-3, atol=0)


def test_a_step_that_overflows_float16_is_done_again_at_a_smaller_scale() -> None:
    calls: list[int] = []

    def loss(down: Tensor, up: Tensor) -> Tensor:
        calls.append(1)
        return down.float().sum() * 10

    it = fixed(loss, torch.float16)
    assert it.stepper.step(some()) == pytest.approx(25)
    # 10 · 2^16 is too much for float16, and so is every half down to 10 · 2^12.
    assert len(calls) == 5 and it.stepper._scale.value == 2**12 and it.stepper.skipped_in_a_row == 0
    torch.testing.assert_close(it.moments()["exp_avg"][:4], torch.full((4,), 1.0))
    told = 10 * float(it.branch.down.compute.detach().float().sum())
    assert it.stepper.step(some(3)) == pytest.approx(3 * told) and len(calls) == 8


def test_a_gradient_of_float16_that_no_scale_saves_is_a_bad_step() -> None:
    # √|x| has the slope infinity · 0 at 0.
    it = fixed(lambda down, up: (up - up.detach()).float().abs().sqrt().sum(), torch.float16)
    weights = it.weights.master.clone()
    assert math.isnan(it.stepper.step(some())) and it.stepper.skipped_in_a_row == 1
    assert torch.equal(it.weights.master, weights) and it.stepper._scale.value == 1


def test_a_bad_loss_of_float16_does_not_touch_the_scale() -> None:
    it = fixed(lambda down, up: down.float().sum() * math.nan, torch.float16)
    assert math.isnan(it.stepper.step(some())) and it.stepper._scale.value == 2**16


def test_float16_learns_as_float32_does() -> None:
    it, exact = fixed(lambda down, up: squares(down.float(), up.float()), torch.float16, 0.7), bench(0.7)
    for _ in range(30):
        it.stepper.step(some())
        exact.step(squares)
    torch.testing.assert_close(it.weights.master, exact.weights.master, rtol=0.02, atol=0.02)


def test_the_average_is_shown_and_training_goes_on_from_the_raw_weights() -> None:
    it, plain = fixed(squares, ema_decay=0.8), fixed(squares)
    expected = it.weights.master.clone()
    for count in range(1, 13):
        it.stepper.step(some()), plain.stepper.step(some())
        expected += (1 - min(0.8, (1 + count) / (10 + count))) * (it.weights.master - expected)
        with it.stepper.shown():
            torch.testing.assert_close(it.weights.master, expected)
            torch.testing.assert_close(it.branch.down.compute.detach(), it.branch.lora_down)
        assert torch.equal(it.weights.master, plain.weights.master)
    it.stepper.finish()
    torch.testing.assert_close(it.weights.master, expected)
    it.weights.master.fill_(7)  # what others put there afterwards stays, as cutting does
    it.stepper.finish()
    with it.stepper.shown():
        assert (it.weights.master == 7).all()


def test_what_is_shown_is_taken_back_after_an_error() -> None:
    it = fixed(squares, torch.bfloat16, ema_decay=0.9)
    for _ in range(3):
        it.stepper.step(some())
    before = it.weights.master.clone()
    with pytest.raises(RuntimeError, match="stop"), it.stepper.shown():
        assert not torch.equal(it.weights.master, before)
        raise RuntimeError("stop")
    assert torch.equal(it.weights.master, before) and torch.equal(it.weights.compute, before.bfloat16())


def test_the_last_good_average_is_that_before_the_last_good_step() -> None:
    it = fixed(squares, ema_decay=0.8)
    seen = []
    for _ in range(4):
        with it.stepper.shown():
            seen.append(it.weights.master.clone())
        it.stepper.step(some())
    it.stepper.restore_last_good()
    it.stepper.finish()
    assert torch.equal(it.weights.master, seen[-1])


def test_a_redrawn_layer_is_shown_as_it_was_redrawn() -> None:
    it = fixed(squares, ema_decay=0.99)
    for _ in range(5):
        it.stepper.step(some())
    it.branch.lora_down.fill_(2)
    it.stepper.restart_average([it.branch.lora_down, it.branch.lora_up])
    before = it.weights.master.clone()
    with it.stepper.shown():
        assert torch.equal(it.weights.master, before)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_stepper_goes_on_bit_for_bit(optimizer, dtype: torch.dtype) -> None:
    def loss(down: Tensor, up: Tensor) -> Tensor:
        return squares(down.float(), up.float()) * 9

    whole, begun, gone_on = (fixed(loss, dtype, 0.7, optimizer=optimizer, ema_decay=0.9) for _ in range(3))
    for _ in range(6):
        whole.stepper.step(some(2)), begun.stepper.step(some(2))
    gone_on.weights.master.copy_(begun.weights.master)
    gone_on.weights.refresh()
    gone_on.stepper.load_state_dict(begun.stepper.state_dict())
    for _ in range(5):
        assert whole.stepper.step(some(2)) == gone_on.stepper.step(some(2))
    whole.stepper.finish(), gone_on.stepper.finish()
    assert torch.equal(whole.weights.master, gone_on.weights.master)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recorded_steps_are_those_of_the_processor(optimizer, dtype: torch.dtype) -> None:
    """With a learning rate that changes, an average, two batches a step, and a bad step among them."""
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
            told = stepper.step([batch, batch], lambda begun=following: [begun] * 2 if step % 3 else ())
            assert math.isnan(told) == (step == 4)
        assert graphs.active == (device.type == "cuda")
        with stepper.shown():
            masters.append(weights.master.cpu().clone())
        masters.append(weights.master.cpu().clone())
    torch.testing.assert_close(masters[:2], masters[2:], rtol=1e-3, atol=1e-4)


class Ahead(CudaGraphRunner):
    """As if all were captured, so that steps are begun as on a GPU."""

    def is_captured(self, function: object, key: object = ()) -> bool:
        return True


@dataclass
class Runner:
    """Steps over a list of batches, of which each is one more thing that its loss depends on."""

    stepper: Stepper
    weights: FlatParameters
    seen: list[float]  # what the loss was asked for, in order

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
def test_steps_that_are_begun_early_are_the_same(dtype: torch.dtype) -> None:
    """One batch or two, a bad one, and in float16 some that overflow, after which the begun one is begun again."""
    factors = [[1.0], [2.0, 0.5], [math.nan], [3e3], [0.1, 3e3, 1.0], [1.0]]
    results = []
    for graphs in (CudaGraphRunner, Ahead):
        it = runner(graphs, dtype)
        steps = [[it.batch(factor) for factor in step] for step in factors]
        told = [
            it.stepper.step(step, lambda following=following: following)
            for step, following in itertools.zip_longest(steps, steps[1:], fillvalue=[])
        ]
        results.append((told, it.weights.master.clone(), it.seen))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0, equal_nan=True)
    plain, ahead = results[0][2], results[1][2]
    assert len(ahead) == len(plain) if dtype != torch.float16 else len(ahead) > len(plain)


def test_what_was_begun_is_forgotten_where_weights_were_changed_or_another_step_comes() -> None:
    for change in (True, False):
        it, plain = runner(Ahead), runner(CudaGraphRunner)
        first, begun, other = (it.batch(factor) for factor in (1.0, 5.0, 2.0))
        it.stepper.step([first], lambda begun=begun: [begun])
        plain.stepper.step([first])
        if change:
            for each in (it, plain):
                each.weights.master.mul_(0.5)
                each.weights.refresh()
            it.stepper.clear_gradients()
        following = begun if change else other
        assert it.stepper.step([following]) == plain.stepper.step([following])
        assert torch.equal(it.weights.master, plain.weights.master)
        assert it.seen == [1.0, 5.0, 5.0 if change else 2.0]


def test_going_back_forgets_what_was_begun() -> None:
    it = runner(Ahead)
    it.stepper.step([it.batch(1.0)], lambda: [it.batch(5.0)])
    it.stepper.restore_last_good()
    assert not it.stepper._gradient.any() and it.stepper._begun is None


ON_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_came_from_layers_that_learn_too_hands_its_gradient_back(dtype: torch.dtype, device: str) -> None:
    """On CUDA through a recorded graph, which ends where the captions come in."""
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
