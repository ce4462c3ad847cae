"""The loss scale of float16 models: halved when a gradient overflows, doubled after a while without overflow."""

import torch

from aclora_core.optim.grad_scaler import GradScaler

YES, NO = torch.tensor(True), torch.tensor(False)


def scaler(value: float | None = None) -> GradScaler:
    found = GradScaler(torch.device("cpu"))
    if value is not None:
        found.value.fill_(value)
    return found


def test_an_overflow_halves_the_scale_down_to_one() -> None:
    it = scaler(4.0)
    found = []
    for _ in range(4):
        found.append((float(it.value), bool(it.can_shrink())))
        it.update(NO, YES)
    assert found == [(4, True), (2, True), (1, False), (1, False)]


def test_the_scale_doubles_after_200_good_steps_in_a_row() -> None:
    it = scaler(8.0)
    for _ in range(199):
        it.update(YES, NO)
    assert it.value == 8
    it.update(NO, YES)
    for _ in range(199):
        it.update(YES, NO)
    assert it.value == 4
    it.update(YES, NO)
    assert it.value == 8
    for _ in range(200):
        it.update(YES, NO)
    assert it.value == 16


def test_a_non_finite_loss_leaves_the_scale() -> None:
    it = scaler()
    for _ in range(500):
        it.update(NO, NO)
    assert it.value == 2**16


def test_the_scale_never_exceeds_its_maximum() -> None:
    it = scaler(2.0**24)
    for _ in range(200):
        it.update(YES, NO)
    assert it.value == 2**24


def test_a_scaler_resumes_from_a_state_dict() -> None:
    it, other = scaler(32.0), scaler()
    for _ in range(150):
        it.update(YES, NO)
    other.load_state_dict({name: tensor.clone() for name, tensor in it.state_dict().items()})
    for _ in range(50):
        other.update(YES, NO)
    assert other.value == 64 and it.value == 32
