"""What both networks say of drawn images, as one dictionary of measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from aclora_core.evaluation import copies, frechet, kid, label_ranks, likeness, share_within, spread, style_share
from bench.eight_styles.features import EfficientNetFeatures, FeatureExtractor, Features, TinyBaseFeatures
from bench.eight_styles.images import JudgeImages
from tools.tiny_base import judge

ICONS, PHOTOS = "icons", "photos"  # the classifier that was trained on the icons; EfficientNet


def train_classifier(
    data: JudgeImages, path: Path, steps: int, seed: int = 0, coarse: int = 0, batch: int = 512
) -> float:
    """Train the classifier on all real images, save it, and return the share of concepts it finds among five."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.from_numpy(data.images).to(device).permute(0, 3, 1, 2).float() / 255
    concepts, styles = torch.tensor(data.concepts, device=device), torch.tensor(data.styles, device=device)
    model = judge.train(images, concepts, styles, steps, seed, batch, coarse)
    torch.save(model.state_dict(), path)
    return judge.judge(model, images[::7], concepts[::7], styles[::7]).concept_in_five


def load_classifier(path: Path, device: torch.device) -> judge.Classifier:
    """Load what train_classifier saved."""
    state = torch.load(path, map_location=device, weights_only=True)
    model = judge.Classifier(*(len(state[f"{head}.weight"]) for head in ("concept", "style"))).to(device)
    model.load_state_dict(state)
    return model.eval()


@dataclass(frozen=True, eq=False)
class Reference:
    """What the images of a style are compared with: features by the name of the network."""

    style: int  # number of the style, for the classifier
    concepts: Tensor  # (n,), number of the concept of each image
    real: Mapping[str, Features]
    training: Mapping[str, Features]
    base: Mapping[str, Features]  # of what the base draws


class Judge:
    """Both networks, and measures of images against a reference."""

    def __init__(self, classifier: judge.Classifier, device: torch.device) -> None:
        self.networks: dict[str, FeatureExtractor] = {
            ICONS: TinyBaseFeatures(classifier),
            PHOTOS: EfficientNetFeatures(device),
        }

    def look(self, images: Tensor) -> dict[str, Features]:
        """Return the features of images (n, h, w, 3) by each network."""
        return {name: network(images) for name, network in self.networks.items()}

    def measures(self, drawn: Mapping[str, Features], reference: Reference) -> dict[str, float]:
        """Return the measures of drawn images, by name; those of a network end in its name."""
        icons = drawn[ICONS]
        assert icons.style_logits is not None and icons.concept_logits is not None
        ranks = label_ranks(icons.concept_logits, reference.concepts)
        found = {
            "style": style_share(icons.style_logits, reference.style),
            "concept": share_within(ranks, 1),
            "concept_in_five": share_within(ranks, 5),
        }
        for name, features in drawn.items():
            found |= {f"{key}_{name}": value for key, value in _distances(features, reference, name).items()}
        return found


def _distances(drawn: Features, reference: Reference, name: str) -> dict[str, float]:
    real, training, base = (part[name].features for part in (reference.real, reference.training, reference.base))
    near = asdict(copies(drawn.features, training, base, real))
    return {
        "likeness": likeness(drawn.features, real),
        "frechet": frechet(drawn.features, real),
        "kid": kid(drawn.features, real),
        "spread": spread(drawn.features),
        **{f"copies_{key}": value for key, value in near.items()},
    }
