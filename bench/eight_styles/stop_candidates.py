"""Measures that a training could stop by: each sees the training and held-out images, never the test images.

Drawn: the held-out captions from fixed seeds, compared with the held-out images and with what the base draws, in the
frozen denoiser's own features. Losses: of held-out images, and of training images, at fixed noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.eight_styles.studio import Studio

SEEDS = 4  # drawings of each held-out caption
STEPS = 10
_NOISE_SEED = 77_000
_LEVEL = 0.2  # noise fraction at which features are taken
_LOSS_SEED = 31


class StopCandidates:
    """Measures the adapter of a style while it trains.

    Args:
        studio: with the adapter on its model.
        learned: indices of the training images.
        held_out: indices of images that the training does not see.
    """

    def __init__(self, studio: Studio, learned: Sequence[int], held_out: Sequence[int]) -> None:
        self.studio, self.learned, self.held_out = studio, list(learned), list(held_out)
        losses = studio.core("training.fixed_noise").FixedNoiseImages
        network, images = studio.session.network, studio.session.images
        self._held_out_loss = losses(network, images, self.held_out, _LOSS_SEED, 64)
        self._training_loss = losses(network, images, self.learned, _LOSS_SEED, 64)
        self.drawn: dict[int, Tensor] = {}  # step -> latents of the held-out captions
        self.losses: dict[int, dict[str, float]] = {}

    def look(self, step: int) -> None:
        """Draw and measure the adapter as it is; call it for step 0 without an adapter."""
        self.drawn[step] = self.studio.draw(self._rows, self._seeds, STEPS)
        held_out, training = self._held_out_loss.losses(), self._training_loss.losses()
        self.losses[step] = {"held_out_loss": float(held_out.mean()), "training_loss": float(training.mean())}

    @property
    def _rows(self) -> list[int]:
        return self.held_out * SEEDS

    @property
    def _seeds(self) -> list[int]:
        return [_NOISE_SEED + number for number in range(len(self._rows))]

    def results(self) -> dict[str, dict[str, float]]:
        """Return the measures at every step; call it when no adapter is on the model."""
        blocks = self.studio.core("acceleration.activation_checkpointing").find_blocks(
            self.studio.session.network.network
        )
        found: dict[str, dict[str, float]] = {str(step): dict(losses) for step, losses in self.losses.items()}
        for name, block in (("early", len(blocks) // 4), ("middle", len(blocks) // 2), ("late", 3 * len(blocks) // 4)):
            features = self._features(blocks[block])
            for step in self.drawn:
                found[str(step)] |= {f"{key}_{name}": value for key, value in _compare(features, step).items()}
        return found

    def _features(self, block: torch.nn.Module) -> dict[Any, Tensor]:
        """Return features (n, tokens, width) of the drawn latents by step, and of the real images."""
        latents = self.studio.session.images.latents
        found: dict[Any, Tensor] = {step: self._of(block, drawn) for step, drawn in self.drawn.items()}
        found["held_out"] = self._of(block, torch.cat([latents[index] for index in self.held_out])).repeat(SEEDS, 1, 1)
        found["learned"] = self._of(block, torch.cat([latents[index] for index in self.learned]))
        return found

    def _of(self, block: torch.nn.Module, latents: Tensor) -> Tensor:
        network, images = self.studio.session.network, self.studio.session.images
        core = self.studio.core("training.learned_style")
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(5)).to(network.device)
        latents = latents.to(network.device).float()
        sigma = torch.full((len(latents),), network.objective.sigma_at(_LEVEL), device=network.device)
        noisy = network.objective.add_noise(sigma, noise.expand_as(latents), latents)
        with torch.no_grad(), core.outputs_of(block) as outputs:
            conditioning = images.conditioning([self.studio.empty] * len(latents))
            network.denoise(noisy, sigma, self.studio.core("storage").to_device(conditioning, network.device))
        tokens: Tensor = core.image_tokens(outputs[-1], latents)
        return tokens.float()


def _compare(features: dict[Any, Tensor], step: int) -> dict[str, float]:
    drawn, base, held_out, learned = (features[key] for key in (step, 0, "held_out", "learned"))
    statistics = {key: _statistics(features[key]) for key in (step, 0, "held_out", "learned")}
    style = torch.cat([statistics["learned"], statistics["held_out"][: len(held_out) // SEEDS]])
    nearest = torch.cdist(drawn.mean(1), learned.mean(1)).min(1).values
    return {
        "gained": _cosine(drawn, held_out),
        "gained_pooled": _cosine(drawn.mean(1), held_out.mean(1)),
        "kept": _cosine(drawn, base),
        "kept_pooled": _cosine(drawn.mean(1), base.mean(1)),
        "style_distance": float((statistics[step].mean(0) - style.mean(0)).norm() / style.std(0).norm()),
        "centred": _cosine(drawn.mean(1) - learned.mean((0, 1)), held_out.mean(1) - learned.mean((0, 1))),
        "nearest_training": float(nearest.mean()),
    }


def _statistics(features: Tensor) -> Tensor:
    """Return mean and standard deviation over the tokens of each image, (n, 2 · width)."""
    return torch.cat([features.mean(1), features.std(1)], 1)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=-1).mean())
