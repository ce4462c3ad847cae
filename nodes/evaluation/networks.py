"""The networks that compare images, and images with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ...aclora_core.evaluation import ImageFeatures, Row, scores_row
from .. import host

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

CLIP_T = "CLIP-T, similarity to the prompt"


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks that are connected."""

    clip_vision: ClipVisionModel | None
    model: ModelPatcher | None
    vae: VAE | None
    clip: CLIP | None

    def check(self) -> None:
        """Raise ValueError unless images can be compared."""
        if self.clip_vision is not None:
            return
        needed = {"model": self.model, "vae": self.vae, "clip": self.clip}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise ValueError(
                "There is no network that compares the images. Connect a Load CLIP Vision node to clip_vision; or "
                f"connect model, vae and clip, of which {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                "missing."
            )

    def extractor(
        self, images: Sequence[Tensor], advance: Callable[[int], None]
    ) -> host.ClipVisionFeatures | host.DenoiserFeatures:
        """Return what gives the features of all these images."""
        if self.clip_vision is not None:
            return host.ClipVisionFeatures(self.clip_vision, advance)
        return host.DenoiserFeatures(self.model, self.vae, self.clip, host.square_side(images), advance)


def clip_similarity(networks: Networks, prompts: Sequence[str], features: ImageFeatures) -> Row:
    """Return the cosine of images and prompts: CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without factor."""
    vision = networks.clip_vision
    if vision is None or vision.model_type != "clip_vision_model":
        return Row(CLIP_T, "higher", missing="needs a clip_vision of CLIP, the only kind that reads texts too")
    if not prompts or networks.clip is None:
        return Row(CLIP_T, "higher", missing="needs the prompts, and clip: the text encoder of the same CLIP model")
    try:
        texts = host.text_features(networks.clip, prompts, features.drawn.shape[1])
    except ValueError as error:
        return Row(CLIP_T, "higher", missing=str(error))
    base = features.base if features.base is not None and len(features.base) == len(texts) else None
    drawn = F.cosine_similarity(features.drawn, texts)
    return scores_row(CLIP_T, drawn, F.cosine_similarity(base, texts) if base is not None else None)
