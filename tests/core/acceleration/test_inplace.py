"""Models that overwrite what their backward pass needs are trained with the right gradients."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aclora_core.acceleration.inplace import InplaceAddLog, NoInplaceAdd
from aclora_core.config.train_config import TrainConfig
from tests.support.toy import WIDTH, toy, train


class Careless(nn.Module):
    """A residual layer that adds to its input in place, though its norm has kept the input."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x)
        added = self.attn(self.norm(x))
        if self.in_place:
            x += added
            return x
        return x + added


def model(in_place: bool):
    torch.manual_seed(0)
    network = nn.ModuleDict({"blocks": nn.ModuleList([Careless(in_place) for _ in range(2)])}).requires_grad_(False)
    found = toy(6)
    found.network = nn.ModuleDict({"attn": nn.Sequential(*network["blocks"])})
    return found


@pytest.mark.parametrize("checkpointing", ["automatic", "all"])
def test_a_model_that_adds_in_place_trains_as_one_that_does_not(checkpointing: str) -> None:
    config = TrainConfig(steps=6, max_rank=2, layers="all", checkpointing=checkpointing)
    careless, careful = (train(model(in_place), config).report.losses for in_place in (True, False))
    assert careless == pytest.approx(careful, rel=1e-5) and careless[-1] != careless[0]


def test_no_inplace_add_ends_with_its_block_and_leaves_sampling_alone() -> None:
    x = torch.ones(2)
    with NoInplaceAdd():
        y = x
        y += 1
        assert torch.equal(x, torch.ones(2)) and torch.equal(y, torch.full((2,), 2.0))
        with torch.no_grad():
            z = x
            z += 1
    assert torch.equal(x, torch.full((2,), 2.0))
    x += 1
    assert torch.equal(x, torch.full((2,), 3.0))


def test_other_errors_are_not_taken_for_an_inplace_addition() -> None:
    broken = toy(6)
    broken.objective = type(broken.objective)(
        add_noise=broken.objective.add_noise,
        denoised=lambda *_: 1 / 0,
        sigma_at=lambda share: share,
        sampling="uniform",
    )
    with pytest.raises(ZeroDivisionError):
        train(broken, TrainConfig(steps=1, max_rank=2))


def test_detach_all_frees_a_failed_step() -> None:
    """Its norm has saved the overwritten tensor, whose history holds the norm: a cycle that is never freed."""

    def accumulator() -> Any:
        return leaf.view_as(leaf).grad_fn.next_functions[0][0]

    leaf = torch.ones(3, requires_grad=True)
    for detached in (False, True):
        overwritten = InplaceAddLog()
        with overwritten:
            x = leaf * 2
            accumulator().metadata["of this step"] = detached
            y = torch.nn.functional.layer_norm(x, (3,))
            x += y
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                x.sum().backward()
        if detached:
            overwritten.detach_all()
        del x, y, overwritten
        gc.collect()
        assert ("of this step" in accumulator().metadata) != detached
        leaf = torch.ones(3, requires_grad=True)
