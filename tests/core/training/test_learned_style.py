"""The verdict on captions that were not learned: style, content and copies, on planted cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from aclora_core.config import TrainConfig
from aclora_core.diffusion import Objective, SimpleModel, SimpleTrainingSet
from aclora_core.training import learned_style, train
from aclora_core.training.adapted_model import AdaptedModel
from aclora_core.training.learned_style import compare, image_tokens, measure
from tests.support.toy import FLOW

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 4
CONFIG = TrainConfig(
    steps=6, learning_rate=1e-2, batch_size=4, max_rank=WIDTH, alpha=WIDTH, mode="off", layers="all", graph=False
)
CLEAN_OUTPUT: Objective = replace(FLOW, denoised=lambda sigma, output, noisy: output)


class Block(nn.Module):
    """Two linear layers over tokens, which change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        for layer in (self.first, self.second):
            nn.init.eye_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(self.first(tokens))


def drawing_model() -> SimpleModel:
    """A model that takes its input for the clean latent, so it draws its noise, shifted by its caption."""
    network = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(3))}).requires_grad_(False)

    def predict(noisy: Tensor, sigma: Tensor, captions: Tensor) -> Tensor:
        tokens = noisy.flatten(2).transpose(1, 2)
        for block in network["blocks"]:
            tokens = block(tokens)
        return tokens.transpose(1, 2).view(noisy.shape) + 0.05 * captions[:, :, None, None]

    return SimpleModel(network, CLEAN_OUTPUT, predict)


def adapted(strength: float) -> AdaptedModel:
    """An adapter that scales what the last block gives, and so the contrast of what is drawn."""
    model = AdaptedModel(drawing_model(), CONFIG, torch.Generator().manual_seed(0))
    layer = model.parameters.layers["diffusion_model.blocks.2.second"]
    layer.lora_down.copy_(torch.eye(WIDTH))
    layer.lora_up.copy_(strength * torch.eye(WIDTH))
    return model


def images(learned: Tensor, prompts: int = 3) -> SimpleTrainingSet:
    """Return images (n, channels, h, w) with random captions, and prompts that are not learned."""
    count = len(learned)
    captions = torch.randn(32, 1, WIDTH, generator=torch.Generator().manual_seed(2))[: count + prompts].unbind()
    latents = [*learned.unsqueeze(1), *[torch.zeros(1, *learned.shape[1:])] * prompts]
    return SimpleTrainingSet(latents, captions, prompts=range(count, count + prompts))


def noise(count: int, seed: int = 1, size: int = 4) -> Tensor:
    return torch.randn(count, WIDTH, size, size, generator=torch.Generator().manual_seed(seed))


def measured(model: AdaptedModel, pictures: SimpleTrainingSet, **more):
    learned = range(len(pictures.latents) - len(pictures.prompts))
    with model.injected():
        return measure(model, pictures, pictures.prompts, learned, batch_size=2, **more)


def test_an_adapter_that_changes_nothing_gains_nothing_and_keeps_all() -> None:
    found = measured(adapted(0.0), images(3 * noise(6)))
    assert found.prompts == 3 and found.style == 0 and found.copies == 0
    assert found.content == pytest.approx(1)


def test_drawings_with_the_contrast_of_the_training_images_have_their_style() -> None:
    """From noise, ten steps at a strength of 0.4 give about three times the contrast."""
    pictures = images(3 * noise(12, size=16))
    right, half, wrong = (measured(adapted(strength), pictures) for strength in (0.4, 0.2, -0.2))
    assert right.style > 0.8 > half.style > 0.2 and wrong.style < 0
    assert right.content > 0.95 and right.copies == 0


def test_drawings_that_repeat_training_images_are_copies() -> None:
    spread = [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in range(12)]
    learned, base, new = spread[:6], spread[6:9], spread[9:]
    assert compare(new, base, learned, 3).copies == 0
    copied = [learned[0] + 0.01, learned[3].flip(0), new[2]]  # the second is turned round
    assert compare(copied, base, learned, 3).copies == pytest.approx(2 / 3)
    assert compare(copied, copied, learned, 3).copies == 0  # so does the model alone
    assert compare(copied, base, learned[:2], 3).copies is None


def test_nobody_can_tell_copies_of_images_that_are_copies_of_each_other() -> None:
    first, second, third, base, new = torch.randn(5, 64, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert compare([first, new], [base, base], [first, first, second, third], 2).copies is None
    assert compare([first, new], [base, base], [first, first, second, second, third, new], 2).copies is None
    assert compare([first, new], [base, base], [first, first, second, third, 2 * base], 2).copies == 1 / 2


@pytest.mark.parametrize(("different", "repeats"), [(6, 1), (6, 3), (20, 1), (20, 2)])
def test_repeats_of_an_image_are_compared_once(monkeypatch: pytest.MonkeyPatch, different: int, repeats: int) -> None:
    """Up to 16 different images, evenly spread; the first of them is for regularisation."""
    asked: list[list[int]] = []
    monkeypatch.setattr(learned_style, "measure", lambda *given: asked.append(given[3]))
    latents = [*noise(different).repeat_interleave(repeats, 0).split(1), torch.zeros(1, WIDTH, 4, 4)]
    captions, regularisation = [torch.zeros(1, WIDTH)] * len(latents), dict.fromkeys(range(repeats), 1.0)
    prompts = [len(latents) - 1]
    pictures = SimpleTrainingSet(latents, captions, regularisation=regularisation, prompts=prompts)
    train(drawing_model(), pictures, CONFIG)
    count = min(different - 1, 16)
    assert asked == [[repeats * (1 + number * (different - 1) // count) for number in range(count)]]


def test_too_few_different_images_tell_no_copies_however_often_they_repeat() -> None:
    facts = train(drawing_model(), images(noise(2).repeat_interleave(5, 0)), CONFIG).report.facts
    assert facts.unseen_prompts == 3 and facts.copied_share is None and not facts.notes


def test_new_images_of_the_style_are_no_copies() -> None:
    """Drawings from the very distribution of the training images are as far from them as those from each other."""

    def alike(count: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shift = torch.randn(count, 1, 16, generator=generator)
        return list(2 * shift + torch.randn(count, 32, 16, generator=generator))

    base = list(torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(9)))
    found = [compare(alike(8, seed), base, alike(16, 100 + seed), 8) for seed in range(10)]
    assert sum(each.copies for each in found) == 0


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        compare([torch.full((4, 2), torch.nan)], [torch.ones(4, 2)], [torch.ones(4, 2)], 1)


TOKENS = torch.arange(2 * 16 * 6.0).view(2, 16, 6)  # of a latent of 8 by 8 in patches of 2 by 2
CAPTION = torch.zeros(2, 77, 6)


@pytest.mark.parametrize(
    "output",
    [
        TOKENS,
        (CAPTION, TOKENS),
        [TOKENS, CAPTION, torch.zeros(2, 6)],
        {"image": TOKENS, "other": torch.zeros(1, 64, 6)},
        TOKENS.transpose(1, 2).reshape(2, 6, 4, 4),
        TOKENS.view(2, 4, 4, 6),
        TOKENS.transpose(1, 2).reshape(2, 6, 1, 4, 4),
    ],
)
def test_the_tokens_of_the_image_are_found_in_any_layout(output) -> None:
    assert torch.equal(image_tokens(output, torch.zeros(2, 3, 8, 8)), TOKENS)


@pytest.mark.parametrize("output", [torch.zeros(2, 6), (torch.zeros(1, 16, 6),), None, torch.zeros(2, 1, 6)])
def test_an_output_without_tokens_is_refused(output) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        image_tokens(output, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("calls", [1, 3, 7])
def test_a_measurement_can_be_stopped(calls: int) -> None:
    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) == calls

    assert measured(adapted(0.4), images(noise(6)), should_stop=should_stop) is None
    assert len(asked) == calls


def test_captions_of_several_sizes_are_measured_together() -> None:
    pictures = images(noise(6))
    pictures.latents = [*pictures.latents[:3], *(torch.ones(1, WIDTH, 8, 4) for _ in range(3)), *pictures.latents[6:]]
    found = measured(adapted(0.0), pictures)
    assert found.style == 0 and found.content == pytest.approx(1)


def factors(result) -> list[Tensor]:
    return [factor for layer in result.adapter.layers.values() for factor in (layer.lora_down, layer.lora_up)]


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_a_training_measures_its_result_and_learns_the_same(held_out: float) -> None:
    config = replace(CONFIG, held_out=held_out, steps=12)
    learned = 3 * noise(8)
    plain = train(drawing_model(), images(learned, prompts=0), config)
    given = train(drawing_model(), images(learned), config)
    assert all(torch.equal(one, other) for one, other in zip(factors(plain), factors(given), strict=True))
    assert plain.report.losses == given.report.losses and plain.report.fit == given.report.fit
    facts = given.report.facts
    assert facts.unseen_prompts == 3 and facts.copied_share == 0
    assert -1 <= facts.style_gained <= 1 and 0 < facts.content_kept <= 1 and not facts.notes
    assert facts.images == 8
    # Held-out captions stand in for prompts; without either nothing is measured.
    assert plain.report.facts.unseen_prompts == (2 if held_out else None)
    assert (plain.report.facts.style_gained is None) == (not held_out)


def test_a_block_without_tokens_costs_a_note_alone() -> None:
    model, learned = drawing_model(), noise(6)

    def predict(noisy: Tensor, sigma: Tensor, captions: Tensor) -> Tensor:
        flat = captions
        for block in model.network["blocks"]:
            flat = block(flat)
        return noisy + flat[:, :, None, None]

    result = train(replace(model, predict=predict), images(learned), CONFIG)
    assert result.report.facts.style_gained is None and len(result.report.losses) == 6
    assert result.report.facts.notes.startswith(
        "Images of unseen prompts could not be measured (a block of the network"
    )


def test_a_cancel_of_the_measurement_keeps_the_training() -> None:
    stages: list[str] = []
    result = train(
        drawing_model(), images(noise(6)), CONFIG, lambda p: stages.append(p.stage), lambda: "comparing" in stages
    )
    facts = result.report.facts
    assert stages[-1] == "comparing" and facts.style_gained is None and facts.cancelled is None and not facts.notes


def test_nothing_is_measured_after_a_cancel() -> None:
    stages: list[str] = []
    result = train(
        drawing_model(), images(noise(6)), CONFIG, lambda p: stages.append(p.stage), lambda: len(stages) == 3
    )
    assert set(stages) == {"training"} and result.report.facts.style_gained is None
