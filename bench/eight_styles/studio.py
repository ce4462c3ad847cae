"""The tiny base with the images of all styles, and the drawing of test images with whatever adapter is on it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.no_search import images
from bench.training_session import Session, training_session
from launcher.inprocess import load_pack, open_host

DRAWING_STEPS = 20
_NOISE_SEED = 11_000  # of the first test image; no training uses it


@dataclass(frozen=True)
class Indices:
    """The indices of a style's images in the training set."""

    training: range
    mirrored: range  # the training images, mirrored
    uncaptioned: range  # the training images with the empty caption
    verdict: range


class Studio:
    """Trains on the styles' images and draws their test captions.

    styles: the images by style. indices: where they are in the training set.
    """

    def __init__(
        self,
        pack: ModuleType,
        session: Session,
        vae: Any,
        styles: dict[str, images.Style],
        indices: dict[str, Indices],
    ) -> None:
        self.pack, self.session, self.vae = pack, session, vae
        self.styles, self.indices = styles, indices
        network = session.network
        self.layers = self.core("lora.targets").preset_layers(network.network, "all", network.prefix)

    def core(self, name: str) -> Any:
        """Return a module of the pack's core."""
        return importlib.import_module(f"{self.pack.__name__}.aclora_core.{name}")

    @property
    def device_name(self) -> str:
        on_gpu = self.session.network.device.type == "cuda"
        return torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"

    @property
    def empty(self) -> int:
        """The index of an image with the empty caption."""
        return next(iter(self.indices.values())).uncaptioned[0]

    def training_set(self, style: str, mirrored: bool) -> Any:
        """Return the training set, with mirrored versions as variants of the style's images where that is asked for."""
        indices = self.indices[style]
        variants = {a: [a, b] for a, b in zip(indices.training, indices.mirrored, strict=True)} if mirrored else {}
        without_caption = dict(zip(indices.training, indices.uncaptioned, strict=True))
        return replace(self.session.images, variants=variants, without_caption=without_caption)

    def draw_verdict(self, style: str) -> Tensor:
        """Draw the test captions with the model as it is, always from the same noise; (n, h, w, 3) in 0..1."""
        indices = self.indices[style].verdict
        return self.decode(self.draw(indices, [_NOISE_SEED + number for number in range(len(indices))]))

    def draw(self, indices: Sequence[int], seeds: Sequence[int], steps: int = DRAWING_STEPS) -> Tensor:
        """Draw the captions of images, each from the noise of a seed; latents as the network has them."""
        network, training_set = self.session.network, self.session.images
        shape = training_set.latents[indices[0]].shape
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        with torch.no_grad():
            conditioning = self.core("storage").to_device(training_set.conditioning(indices), network.device)
            return self.core("diffusion").draw_latents(network, noise, conditioning, steps)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (n, h, w, 3) in 0..1 of latents."""
        with torch.inference_mode():
            pixels = self.vae.decode(self.session.network.base.process_latent_out(latents.clone()))
        return pixels.float().clamp(0, 1).clone().cpu()

    def real(self, style: str) -> Tensor:
        """Return the real test images of a style."""
        return _pixels(self.styles[style].verdict)

    def training_images(self, style: str, count: int) -> Tensor:
        """Return the first training images of a style."""
        return _pixels(self.styles[style].training)[:count]

    def through_autoencoder(self, style: str) -> Tensor:
        """Return the real test images of a style as the autoencoder gives them back."""
        with torch.inference_mode():
            return self.vae.decode(self.vae.encode(self.real(style))).float().clamp(0, 1).clone().cpu()


def digest_of_encoders(folder: Path) -> str:
    """Return a hash of the files that encode images and captions, so that no other base's encodings are taken."""
    parts = [(folder / f"{name}.safetensors").read_bytes() for name in ("text_encoder", "autoencoder")]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


@contextmanager
def opened(host: Path, data: Path) -> Iterator[Studio]:
    """Open the tiny base with the images of a file; their encodings are kept beside it."""
    open_host(host)
    pack = load_pack()
    styles = images.read(data)
    with torch.inference_mode():
        model, clip, vae = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        kept = data.with_suffix(f".encoded-{digest_of_encoders(pack.nodes.tiny_base.FOLDER)}.pt")
        encoded = torch.load(kept, weights_only=False) if kept.is_file() else _encode(styles, clip, vae)
        if not kept.is_file():
            torch.save(encoded, kept)
        latents, conditioning, indices = encoded
        with training_session(pack, model, latents, conditioning) as session:  # loads the model in inference mode
            yield Studio(pack, session, vae, styles, indices)


def _encode(
    styles: dict[str, images.Style], clip: Any, vae: Any
) -> tuple[list[dict[str, Tensor]], list[Any], dict[str, Indices]]:
    latents: list[dict[str, Tensor]] = []
    conditioning: list[Any] = []

    def add(pixels: Tensor, captions: Sequence[str]) -> range:
        first = len(latents)
        latents.extend({"samples": sample.clone()} for sample in vae.encode(pixels).split(1))
        conditioning.extend(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in captions)
        return range(first, len(latents))

    indices = {}
    for name, style in styles.items():
        training, captions = _pixels(style.training), style.training.captions
        indices[name] = Indices(
            add(training, captions),
            add(training.flip(2), captions),
            add(training, [""] * len(captions)),
            add(_pixels(style.verdict), style.verdict.captions),
        )
    return latents, conditioning, indices


def _pixels(part: images.Part) -> Tensor:
    return torch.from_numpy(part.images).float() / 255
