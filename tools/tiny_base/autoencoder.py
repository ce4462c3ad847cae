"""The autoencoder of the tiny base: TAESD's architecture, trained from scratch on the icons.

ComfyUI's own modules are trained, so its VAE loader loads the weights unchanged. Latents are kept close to mean 0 and
variance 1 during training; the rest is folded into TAESD's `vae_scale` and `vae_shift`, so that ComfyUI's SD3 latent
format gives unit variance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609  # ComfyUI's SD3 latent format: (latent - shift) * scale
log = logging.getLogger("aclora.tiny_base")


def build(latent_channels: int = CHANNELS) -> torch.nn.Module:
    """Return ComfyUI's TAESD with newly initialised weights."""
    from comfy.taesd.taesd import TAESD

    model = TAESD(latent_channels=latent_channels)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.data.mul_(0.7)  # three-convolution residual blocks: keep the sum from growing with depth
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return model


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment colour and position, so that the autoencoder generalises to other styles.

    images: (n, 3, h, w) in 0..1. One image in seven becomes black ink, one in seven gets its channels permuted.
    """
    n, _, h, w = images.shape
    device = images.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    kind = draw(n, 1, 1, 1)
    grey = images.mean(1, keepdim=True)
    ink = (grey > 0.35 + 0.5 * draw(n, 1, 1, 1)).to(images).expand_as(images)
    order = torch.argsort(draw(n, 3), dim=1)[:, :, None, None].expand(-1, -1, h, w)
    images = torch.where(kind < 1 / 7, ink, torch.where(kind > 6 / 7, images.gather(1, order), images))
    zoom = 0.75 + 0.45 * draw(n)
    shift = 0.2 * (draw(n, 2) - 0.5)
    flip = torch.where(draw(n) < 0.5, 1.0, -1.0)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip / zoom, 1 / zoom, shift
    grid = F.affine_grid(theta, [n, 3, h, w], align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)  # white outside the image


def gradients(images: Tensor) -> Tensor:
    """Return the differences to the right and lower neighbour, cropped to (n, 2c, h-1, w-1)."""
    right = images[..., :-1, 1:] - images[..., :-1, :-1]
    down = images[..., 1:, :-1] - images[..., :-1, :-1]
    return torch.cat([right, down], 1)


def loss_of(output: Tensor, target: Tensor, latents: Tensor) -> Tensor:
    """Sum pixel losses (squared and absolute), an edge loss, and a penalty on the latents' mean and variance."""
    output, target, latents = output.float(), target.float(), latents.float()
    pixels = F.mse_loss(output, target) * 4 + F.l1_loss(output, target)
    edges = F.l1_loss(gradients(output), gradients(target))
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    return pixels + edges + 0.01 * (mean.square() + (variance - 1).square()).mean()


def psnr(model: torch.nn.Module, images: Tensor, batch: int = 128) -> float:
    """Return the PSNR in dB of images (n, 3, h, w) in 0..1 after encoding and decoding."""
    total = 0.0
    with torch.no_grad():
        for part in images.split(batch):
            output = model.taesd_decoder(model.taesd_encoder(part.float())).clamp(0, 1)
            total += F.mse_loss(output, part.float(), reduction="sum").item()
    return -10 * math.log10(total / images.numel())


def train(
    images: Tensor, steps: int, batch: int, seed: int, on_step: Callable[[int, float], None] | None = None
) -> torch.nn.Module:
    """Train on images (n, 3, h, w) in 0..1, on their device, and fold the latents' statistics in."""
    torch.manual_seed(seed)
    device = images.device
    generator = torch.Generator(device).manual_seed(seed)
    model = build().to(device, memory_format=torch.channels_last)
    weights = [p for name, p in model.named_parameters() if not name.startswith("vae_")]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator, device=device)
        target = augment(images[index].float(), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = model.taesd_encoder(target)
            # A little noise on the latents makes the decoder robust to the denoiser's residual noise.
            noise = torch.randn(latents.shape, generator=generator, device=device) * 0.05
            output = model.taesd_decoder(latents + noise)
        loss = loss_of(output, target, latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step and step % 50 == 0:
            on_step(step, loss.item())
    return fold_statistics(model.eval().requires_grad_(False), images)


def fold_statistics(model: torch.nn.Module, images: Tensor) -> torch.nn.Module:
    """Set vae_scale and vae_shift so that ComfyUI's SD3 latent format gives mean 0 and variance 1."""
    with torch.no_grad():
        latents = torch.cat([model.taesd_encoder(part.float()) for part in images.split(128)])
        scale = latents.std() * SD3_SCALE
        model.vae_scale.copy_(scale)
        model.vae_shift.copy_(SD3_SHIFT - latents.mean() / scale)
    return model


def encode(model: torch.nn.Module, images: Tensor, batch: int = 128) -> Tensor:
    """Encode images (n, 3, h, w) in 0..1 to the denoiser's latents (n, 16, h/8, w/8) of unit variance."""
    with torch.no_grad():
        parts = [model.encode(part.float() * 2 - 1) for part in images.split(batch)]
    return (torch.cat(parts) - SD3_SHIFT) * SD3_SCALE


def decode(model: torch.nn.Module, latents: Tensor, batch: int = 128) -> Tensor:
    """Decode latents to images (n, 3, h, w) in 0..1."""
    with torch.no_grad():
        parts = [model.decode(part.float() / SD3_SCALE + SD3_SHIFT) for part in latents.split(batch)]
    return (torch.cat(parts) * 0.5 + 0.5).clamp(0, 1)
