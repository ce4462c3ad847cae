"""The EMA against a plain loop, after skipped steps, and at a restart."""

import pytest
import torch

from aclora_core.adapter.adapter import Layer
from aclora_core.lora.parameters import FlatParameters
from aclora_core.optim.ema import Ema

YES, NO = torch.tensor(True), torch.tensor(False)


def weights() -> FlatParameters:
    layer = Layer(torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[4.0, -1.0]]), 2.0)
    return FlatParameters({"one": layer, "two": layer}, torch.device("cpu"))


def walk(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(weights().master.shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_ema_matches_a_float64_loop(decay: float) -> None:
    it = weights()
    average, expected = Ema(it, decay), it.master.double()
    for count, values in enumerate(walk(60), start=1):
        it.master.copy_(values)
        average.update(YES)
        share = min(decay, (1 + count) / (10 + count))
        expected = share * expected + (1 - share) * values.double()
        torch.testing.assert_close(average.value.double(), expected, rtol=1e-5, atol=1e-6)


def test_skipped_steps_leave_the_ema_even_if_the_weights_are_nan() -> None:
    it = weights()
    average = Ema(it, 0.9)
    average.update(YES)
    before = [tensor.clone() for tensor in average.tensors()]
    it.master.fill_(float("nan"))
    average.update(NO)
    for tensor, value in zip(average.tensors(), before, strict=True):
        assert torch.equal(tensor, value)


def test_restore_last_good_gives_the_average_before_the_last_finite_step() -> None:
    it = weights()
    average = Ema(it, 0.9)
    seen = [average.value.clone()]
    for values in walk(3):
        it.master.copy_(values)
        average.update(YES)
        seen.append(average.value.clone())
    average.update(NO)
    average.restore_last_good()
    assert torch.equal(average.value, seen[-2])


def test_a_restart_copies_the_new_weights_of_the_given_layers_and_warms_up_again() -> None:
    it = weights()
    average = Ema(it, 0.999)
    for values in walk(50):
        it.master.copy_(values)
        average.update(YES)
    kept = average.value[it.span(it.layers["two"].lora_up)].clone()
    one = it.layers["one"]
    average.restart([it.span(one.lora_down), it.span(one.lora_up)])
    assert torch.equal(average.value[it.span(one.lora_down)], it.master[it.span(one.lora_down)])
    assert torch.equal(average.value[it.span(one.lora_up)], it.master[it.span(one.lora_up)])
    assert torch.equal(average.value[it.span(it.layers["two"].lora_up)], kept)
    before = average.value.clone()
    it.master.add_(1)
    average.update(YES)
    torch.testing.assert_close(average.value, before + (it.master - before) * (1 - 2 / 11))


def test_a_restart_of_no_weights_changes_nothing() -> None:
    it = weights()
    average = Ema(it, 0.999)
    for values in walk(5):
        it.master.copy_(values)
        average.update(YES)
    before = [tensor.clone() for tensor in average.tensors()]
    average.restart([])
    assert all(torch.equal(tensor, value) for tensor, value in zip(average.tensors(), before, strict=True))
