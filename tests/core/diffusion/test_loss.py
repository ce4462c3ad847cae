"""Masks: brought to the latents' size, fair to small ones, and what they leave out teaches nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aclora_core.config.train_config import TrainConfig
from aclora_core.dataset.masks import at_latent_size, is_black
from aclora_core.diffusion.loss import denoising_losses, position_weights
from aclora_core.training.batches import BatchStream, stack_position_weights
from aclora_core.training.fixed_noise import FixedNoiseImages
from tests.support.toy import FLOW, WIDTH, Toy, toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

LEFT = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
QUICK = TrainConfig(steps=8, learning_rate=0.02, batch_size=4, max_rank=4, mode="off", weight_decay=0.0, held_out=0.0)


def square_toy(count: int = 8, **changes) -> Toy:
    """The toy with pictures of 4 channels and 2 × 2 places; it is wrong on the right of the pictures alone."""
    error = torch.zeros(WIDTH, WIDTH)
    error[1::2] = torch.randn(WIDTH // 2, WIDTH, generator=torch.Generator().manual_seed(3))
    model = toy(count, **{"error": error, **changes})
    model.latents = [latent.reshape(1, 4, 2, 2) for latent in model.latents]
    return model


def test_each_place_gets_the_mean_of_its_area() -> None:
    mask = torch.zeros(16, 24)
    mask[:8, :8], mask[8:12, 16:] = 1.0, 1.0
    small = at_latent_size(mask, torch.zeros(1, 4, 2, 3))
    assert torch.equal(small, torch.tensor([[[[1.0, 0, 0], [0, 0, 0.5]]]]))
    assert at_latent_size(mask, torch.zeros(1, 16, 1, 2, 3)).shape == (1, 1, 1, 2, 3)  # of a video model
    assert torch.equal(at_latent_size(small[0, 0], torch.zeros(1, 4, 2, 3)), small)


def test_dust_is_black_and_one_white_place_is_not() -> None:
    mask = torch.zeros(64, 64)
    assert is_black(mask) and is_black(mask + 0.01)
    mask[5, 5] = 1
    assert not is_black(mask) and is_black(mask, 8)  # a dot of one pixel is 1/64 of a place
    mask[:8, :8] = 0.1
    assert not is_black(mask, 8)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda row: max(row) > 0.02), st.floats(0, 1))
def test_every_picture_weighs_the_same_however_small_its_mask(values: list[float], floor: float) -> None:
    mask = torch.tensor(values).reshape(1, 1, 2, 3)
    weights = position_weights(mask, floor)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(weights * (floor + (1 - floor) * mask).mean(), floor + (1 - floor) * mask)


def test_a_floor_lets_black_count_a_little_and_one_takes_the_mask_away() -> None:
    weights = position_weights(LEFT, 0.1).flatten()
    assert float(weights[1] / weights[0]) == pytest.approx(0.1)
    assert torch.equal(position_weights(LEFT, 1.0), torch.ones(1, 1, 2, 2))


def test_without_masks_there_is_nothing_and_with_some_everybody_has_weights() -> None:
    model = square_toy(3)
    assert stack_position_weights(model, [0, 1], 0.0) is None
    model.masks = {1: LEFT}
    joined = stack_position_weights(model, [0, 1], 0.0)
    assert torch.equal(joined, torch.cat([torch.ones(1, 1, 2, 2), 2 * LEFT]))
    assert torch.equal(stack_position_weights(model, [2], 0.0), torch.ones(1, 1, 2, 2))


def test_the_loss_is_the_mean_over_what_is_white() -> None:
    model = square_toy(4, objective=FLOW)
    config = replace(QUICK, batch_size=4)

    def losses(**masks: dict[int, Tensor]) -> Tensor:
        changed = replace(model, **masks)
        step = BatchStream(changed, changed, config, range(4), torch.Generator().manual_seed(0)).next_step()
        (batch,) = step.batches
        return batch, denoising_losses(changed, batch)

    plain_batch, plain = losses()
    batch, masked = losses(masks={0: LEFT, 2: LEFT})
    assert plain_batch.position_weights is None and torch.equal(plain_batch.noise, batch.noise)
    order = batch.conditioning["pictures"].tolist()
    noisy = FLOW.add_noise(batch.sigma, batch.noise, batch.latents)
    output = model.network["attn"](noisy.flatten(1)).view(noisy.shape)
    squares = (output - (batch.noise - batch.latents)).square()
    for row, number in enumerate(order):
        white = squares[row, :, :, 0] if number in (0, 2) else squares[row]
        assert float(masked[row]) == pytest.approx(float(white.mean()), rel=1e-4)
        assert number in (0, 2) or masked[row] == plain[row]


def test_what_is_masked_out_teaches_nothing_and_a_floor_lets_it_teach() -> None:
    model = square_toy(masks={number: LEFT for number in range(8)})
    nothing = train(model, QUICK)
    assert nothing.report.losses == [0.0] * 8
    assert not nothing.adapter.layers["toy.attn"].lora_up.any()
    some = train(model, replace(QUICK, mask_floor=0.1)).adapter.layers["toy.attn"].lora_up
    assert some[1::2].any()
    unmasked = train(square_toy(), QUICK).adapter.layers["toy.attn"].lora_up
    assert unmasked[1::2].any()


def test_masks_of_pure_white_and_a_floor_of_one_change_nothing() -> None:
    plain = train(square_toy(12), QUICK)
    white = train(square_toy(12, masks={3: torch.ones(1, 1, 2, 2)}), QUICK)
    floored = train(square_toy(12, masks={3: LEFT}), replace(QUICK, mask_floor=1.0))
    for other in (white, floored):
        assert other.report.losses == plain.report.losses
        assert torch.equal(other.adapter.layers["toy.attn"].lora_up, plain.adapter.layers["toy.attn"].lora_up)


def test_the_held_out_loss_is_weighed_in_the_same_way() -> None:
    model = square_toy(4, masks={1: LEFT})
    half = FixedNoiseImages(model, model, [1], 0, mask_floor=0.0).losses()
    assert torch.equal(half, torch.zeros(4).double()) and FixedNoiseImages(model, model, [0], 0).losses().all()
    whole = FixedNoiseImages(square_toy(4), square_toy(4), [1], 0).losses()
    torch.testing.assert_close(FixedNoiseImages(model, model, [1], 0, mask_floor=0.5).losses(), whole * 0.5 / 0.75)
