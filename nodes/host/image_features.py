"""Features of images from the host's networks: a CLIP_VISION, or the denoiser of a MODEL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import comfy.clip_model
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...aclora_core.storage import tensors_in

NOISE = 0.2  # fraction of the noise at which the denoiser looks at an image
_NOISE_SEED = 5
_ROWS = 4  # of blocks that are looked at for features
_STEP = 64  # pixels; sides of which every model's latents are whole
_LARGEST = 512  # pixels; features of larger images cost more and say little more


class ClipVisionFeatures:
    """Features of a CLIP_VISION: the embedding that CLIP compares with texts, DINO's class token, SigLIP's mean token.

    Args:
        clip_vision: the host's CLIP_VISION.
        advance: called with the number of images that were finished.
    """

    def __init__(self, clip_vision: Any, advance: Callable[[int], None]) -> None:
        self.clip_vision, self._advance = clip_vision, advance

    @property
    def name(self) -> str:
        """What gives the features, for tables."""
        return f"CLIP_VISION, {self.clip_vision.model_type}"

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return (n, d), float32 on the CPU, for images (height, width, 3) in 0 to 1."""
        rows = []
        for image in images:
            rows.append(_pooled(self._embedding(image[None])).float().cpu())
            self._advance(1)
        return torch.cat(rows)

    def _embedding(self, pixels: Tensor) -> Tensor:
        # ComfyUI's encode_image wants hidden states, which its DINOv3 does not give.
        if self.clip_vision.model_type != "dinov3":
            return self.clip_vision.encode_image(pixels)["image_embeds"]
        vision = self.clip_vision
        comfy.model_management.load_model_gpu(vision.patcher)
        scaled = comfy.clip_model.clip_preprocess(
            pixels.to(vision.load_device), vision.image_size, vision.image_mean, vision.image_std
        )
        return vision.model(pixel_values=scaled.float())[2]


class DenoiserFeatures:
    """Features of a MODEL's denoiser: what a block in its first half makes of a slightly noisy image.

    All images get the same noise and the empty caption, and are scaled to one square. A block's activations have large
    parts that are the same for every image, such as those of the text; so the features of a grey image are subtracted.

    Args:
        model: the host's MODEL.
        vae: its VAE.
        clip: its CLIP.
        side: pixels of the square, from square_side.
        advance: called with the number of images that were finished.
    """

    def __init__(self, model: Any, vae: Any, clip: Any, side: int, advance: Callable[[int], None]) -> None:
        self.model, self.vae, self._side, self._advance = model, vae, side, advance
        self._empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        self._blocks = _feature_blocks(model.model.diffusion_model)
        grey = self._activations(torch.full((side, side, 3), 0.5))
        if not grey:
            raise ValueError(
                f"No features can be read from this MODEL: {type(model.model.diffusion_model).__name__} has no blocks "
                "whose activations are known. Connect a CLIP_VISION instead."
            )
        self._block, self._grey = next(iter(grey.items()))

    @property
    def name(self) -> str:
        """What gives the features, for tables."""
        return f"denoiser, {self._block}, images at {self._side} x {self._side}"

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return (n, d), float32 on the CPU, for images (height, width, 3) in 0 to 1."""
        rows = []
        for image in images:
            rows.append(self._activations(image)[self._block] - self._grey)
            self._advance(1)
        return torch.cat(rows)

    def _activations(self, image: Tensor) -> dict[str, Tensor]:
        """Return the means over all positions in each block, (1, d)."""
        latent = self.vae.encode(_square(image, self._side)[None])
        kept: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, block in self._blocks.items():
                hooks.callback(block.register_forward_hook(_keep_means(kept, name)).remove)
            self._denoise(latent)
        return {name: kept[name] for name in self._blocks if name in kept}

    def _denoise(self, latent: Tensor) -> None:
        """Run the denoiser once, by one step of the host's sampler from a little noise."""
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
        sampling = self.model.get_model_object("model_sampling")
        sigmas = torch.tensor([float(sampling.percent_to_sigma(1 - NOISE)), 0.0])
        sampler = comfy.samplers.sampler_object("euler")
        comfy.sample.sample_custom(
            self.model, noise, 1.0, sampler, sigmas, self._empty, self._empty, latent, disable_pbar=True, seed=0
        )


def square_side(images: Sequence[Tensor]) -> int:
    """Return the side of the squares that the denoiser gets: the smallest image's, rounded, and not too large."""
    smallest = min(min(image.shape[:2]) for image in images)
    return min(_LARGEST, max(_STEP, round(smallest / _STEP) * _STEP))


def text_features(clip: Any, prompts: Sequence[str], width: int) -> Tensor:
    """Return CLIP's embeddings of prompts (n, width), which are compared with those of its images.

    Args:
        clip: the host's CLIP.
        prompts: the texts.
        width: of the images' embeddings.

    Raises:
        ValueError: this CLIP has no text embeddings of that width; the message is a reason for a table.
    """
    tower = getattr(clip.cond_stage_model, str(getattr(clip.cond_stage_model, "clip", "")), None)
    if getattr(tower, "return_projected_pooled", True) is False:
        raise ValueError("this CLIP's text encoder came without the projection to CLIP's common space")
    rows = []
    for prompt in prompts:
        _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        if pooled is None or pooled.shape[-1] != width:
            found = "no embedding of a whole text" if pooled is None else f"embeddings of width {pooled.shape[-1]}"
            raise ValueError(f"clip has {found}, clip_vision those of width {width}; connect both of one CLIP model")
        rows.append(pooled[:1].float().cpu())
    return torch.cat(rows)


def decode_latent(vae: Any, samples: Tensor) -> list[Tensor]:
    """Return the images (height, width, 3) of a latent (n, channels, ..., h, w)."""
    found = []
    for sample in samples.split(1):
        pixels = vae.decode(sample)
        found += list(pixels.reshape(-1, *pixels.shape[-3:]).float().cpu().clamp(0, 1))
    return found


def _pooled(embedding: Tensor) -> Tensor:
    """Return (1, d) of an embedding that may still have a vector for each token, as ComfyUI's SigLIP gives it."""
    return embedding.mean(1) if embedding.ndim == 3 else embedding


def _square(image: Tensor, side: int) -> Tensor:
    """Return the middle square of an image (h, w, 3), scaled to side × side."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    size = max(side, round(height * scale)), max(side, round(width * scale))
    scaled = F.interpolate(image.movedim(-1, 0)[None].float(), size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return scaled[:, top : top + side, left : left + side].movedim(0, -1)


def _feature_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Return blocks between the network's start, which sees pixels, and its end, which sees the prediction.

    First the middle of a UNet, then the block after a third of each row of blocks, the largest row first.
    """
    rows = [(name, row) for name, row in network.named_modules() if isinstance(row, nn.ModuleList | nn.ModuleDict)]
    rows.sort(key=lambda row: -sum(weight.numel() for weight in row[1].parameters()))
    found: dict[str, Any] = {"middle_block": getattr(network, "middle_block", None)}
    for name, row in rows[:_ROWS]:
        blocks = list(row.children())
        found |= {f"{name}.{len(blocks) // 3}": blocks[len(blocks) // 3]} if blocks else {}
    return dict(_last_part(name, block) for name, block in found.items() if isinstance(block, nn.Module))


def _last_part(name: str, block: Any) -> tuple[str, nn.Module]:
    """Return the last module of a sequence, whose parts ComfyUI's UNet calls one by one."""
    while isinstance(block, nn.Sequential | nn.ModuleList) and len(block):
        name, block = f"{name}.{len(block) - 1}", block[-1]
    return name, block


def _keep_means(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    """Return a forward hook that keeps the means of a block's activations for one image, if it has any."""

    def keep(block: nn.Module, given: Any, output: Any) -> None:
        means = [_mean_over_positions(each) for each in tensors_in(output) if each.ndim > 2]
        if means and all(len(rows) == 1 for rows in means):  # others see parts of an image in their rows
            kept[name] = torch.cat(means, 1).float().cpu()  # of several streams side by side

    return keep


def _mean_over_positions(activations: Tensor) -> Tensor:
    """Return (n, d) of (n, tokens, d), (n, d, h, w), or of more dimensions, of which the widest are the channels."""
    if activations.ndim == 3:
        return activations.mean(1)
    sizes = activations.shape[1:]
    channels = 1 + max(range(len(sizes)), key=sizes.__getitem__)
    others = [axis for axis in range(1, activations.ndim) if axis != channels]
    return activations.mean(others)
