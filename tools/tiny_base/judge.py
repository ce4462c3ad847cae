"""Evaluate the tiny base's images with a classifier of concepts and styles.

The classifier is trained on the real images, shifted, scaled and blurred, and never on a generated one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 64


class Block(nn.Module):
    """A residual block of two convolutions; the first has stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


class Classifier(nn.Module):
    """Classify images (n, 3, 64, 64) in 0..1: logits of the concepts and of the styles."""

    def __init__(self, concepts: int, styles: int) -> None:
        super().__init__()
        widths = (3, 64, 128, 256, 512)
        self.body = nn.Sequential(*(Block(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.concept, self.style = nn.Linear(512, concepts), nn.Linear(512, styles)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images * 2 - 1).mean((2, 3))
        return self.concept(F.dropout(features, 0.2, self.training)), self.style(features)


@dataclass(frozen=True)
class Verdict:
    """Shares of the images for which the classifier is right."""

    concept_first: float
    concept_in_five: float
    style: float


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    n, device = len(images), images.device
    zoom = 0.8 + 0.35 * torch.rand(n, generator=generator, device=device)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
    theta[:, :, 2] = 0.2 * (torch.rand(n, 2, generator=generator, device=device) - 0.5)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(n, 1, 1, 1, generator=generator, device=device)
    noise = 0.05 * torch.randn(images.shape, generator=generator, device=device)
    return torch.lerp(images, blurred, share) + noise


def train(
    images: Tensor, concepts: Tensor, styles: Tensor, steps: int, seed: int, batch: int = 512, coarse: int = 0
) -> Classifier:
    """Train a classifier on images (n, 3, h, w) in 0..1 with class indices (n,), all on one device.

    coarse: steps before the others, on images of half the size, which take a quarter of the time.
    """
    torch.manual_seed(seed)
    device = images.device
    generator = torch.Generator(device).manual_seed(seed)
    fine, small = (F.interpolate(images.float(), (size, size), mode="area") for size in (SIZE, SIZE // 2))
    model = Classifier(int(concepts.max()) + 1, int(styles.max()) + 1).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=coarse + steps)
    for step in range(coarse + steps):
        index = torch.randint(len(images), (batch,), generator=generator, device=device)
        seen = _augment((small if step < coarse else fine)[index], generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=_has_fast_bfloat16(device)):
            concept, style = model(seen.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(concept.float(), concepts[index], label_smoothing=0.1)
            loss = loss + F.cross_entropy(style.float(), styles[index])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _has_fast_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def judge(model: Classifier, images: Tensor, concepts: Tensor, styles: Tensor) -> Verdict:
    """Return how often the classifier finds the concept and style that images (n, 3, h, w) in 0..1 should have."""
    with torch.no_grad():
        concept, style = model(F.interpolate(images.float(), (SIZE, SIZE), mode="area"))
    five = concept.topk(min(5, concept.shape[1]), dim=1).indices
    hit = five == concepts[:, None]
    return Verdict(
        concept_first=hit[:, 0].float().mean().item(),
        concept_in_five=hit.any(1).float().mean().item(),
        style=(style.argmax(1) == styles).float().mean().item(),
    )
