"""All measures of a LoRA's images, beside those of the base's images and of the real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .estimate import Estimate, difference, estimate
from .measures import cmmd, kid, likeness, nearest_cosines, spread

_SAME_IMAGE = 0.9999  # cosine; two encodings of one image differ by rounding only

SIMILARITY = "similarity to the references"
PAIRED = "similarity to its own reference"
MATCH = "its own reference is the nearest"
NEAREST = "similarity to the nearest training image"
NEARER = "nearer to a training image than to any reference"
COPIES = "copies of training images"
SPREAD = "spread"

Better = Literal["higher", "lower", "as the references"]


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of sets of images from one network, a row for each image."""

    drawn: Tensor  # (n, d)
    references: Tensor  # (m, d), real images of the style
    base: Tensor | None = None  # (b, d), what the base draws without the LoRA for the same prompts
    training: Tensor | None = None  # (k, d), what the LoRA was trained on


@dataclass(frozen=True)
class Row:
    """One measure."""

    name: str
    better: Better
    drawn: Estimate | None = None
    base: Estimate | None = None
    references: Estimate | None = None
    gain: Estimate | None = None  # drawn - base
    missing: str = ""  # why there is no number, and what to do


@dataclass(frozen=True)
class Neighbour:
    """The image of a set that resembles another image most."""

    index: int
    cosine: float


@dataclass(frozen=True)
class Nearest:
    """What one drawn image resembles most."""

    drawn: int  # index
    training: Neighbour | None
    reference: Neighbour
    copied: bool  # see `_copied`


@dataclass(frozen=True)
class Evaluation:
    """The measures, and the nearest images of every drawn image, the nearest first."""

    rows: list[Row]
    nearest: list[Nearest]
    counts: dict[str, int]  # images of each set

    def row(self, name: str) -> Row | None:
        """Return the row of this name, if there is one."""
        return next((row for row in self.rows if row.name == name), None)


def evaluate(features: ImageFeatures, pairs: bool = False) -> Evaluation:
    """Measure drawn images against real ones, and against what the base draws.

    All features are scaled to one length first, so that no measure depends on a network's units.

    Args:
        features: of all sets.
        pairs: whether the i-th drawn image is of what the i-th reference shows.

    Raises:
        ValueError: the features do not fit together or are not finite, or pairs are asked for and the numbers differ.
    """
    sets = _scaled(features)
    if pairs and len(sets.drawn) != len(sets.references):
        raise ValueError(
            f"pairs needs a reference for every drawn image, but there are {len(sets.drawn)} drawn images and "
            f"{len(sets.references)} references. Switch pairs off, or connect as many references, in the same order."
        )
    rows = [
        *([_paired_similarity(sets), _match(sets)] if pairs else []),
        _similarity(sets),
        _distance("CMMD", cmmd, sets),
        _distance("KID", kid, sets),
        _nearest_training(sets),
        _nearer_to_training(sets),
        _copies(sets),
        _spread(sets),
    ]
    given = {"drawn": sets.drawn, "references": sets.references, "base": sets.base, "training": sets.training}
    counts = {name: len(rows) for name, rows in given.items() if rows is not None}
    return Evaluation(rows, _nearest(sets), counts)


def scores_row(
    name: str, drawn: Tensor, base: Tensor | None = None, references: Tensor | None = None, better: Better = "higher"
) -> Row:
    """Return the row of a score that every image has for itself, such as its similarity to the prompt.

    Args:
        name: of the measure.
        drawn: (n,).
        base: (b,), for the same prompts in the same order where b = n.
        references: (m,).
        better: which values are good.
    """
    own, real = estimate(_mean, drawn), _mean_of(references)
    if base is None:
        return Row(name, better, own, None, real)
    plain = estimate(_mean, base)
    gain = estimate(_mean, drawn - base) if len(base) == len(drawn) else difference(own, plain)
    return Row(name, better, own, plain, real, gain)


# --- rows ---


def _similarity(sets: ImageFeatures) -> Row:
    real = _self_similarity(sets.references) if len(sets.references) > 1 else None
    return _against(SIMILARITY, "higher", mean_cosine, sets, sets.references, real=real)


def _self_similarity(images: Tensor) -> Estimate:
    return estimate(lambda rows: 1 - spread(rows), images)


def _paired_similarity(sets: ImageFeatures) -> Row:
    def cosine(rows: Tensor) -> float:
        return likeness(rows[:, 0], rows[:, 1])

    drawn = estimate(cosine, torch.stack([sets.drawn, sets.references], 1))
    if sets.base is None or len(sets.base) != len(sets.references):
        return Row(PAIRED, "higher", drawn)
    three = torch.stack([sets.drawn, sets.base, sets.references], 1)
    base = estimate(cosine, three[:, 1:])
    gain = estimate(lambda rows: likeness(rows[:, 0], rows[:, 2]) - likeness(rows[:, 1], rows[:, 2]), three)
    return Row(PAIRED, "higher", drawn, base, gain=gain)


def _match(sets: ImageFeatures) -> Row:
    """Return the share of images that resemble their own reference more than any other; it sees content, not style."""

    def hits(images: Tensor) -> Tensor:
        return (_cosines(images, sets.references).argmax(1) == torch.arange(len(images))).double()

    paired_base = sets.base is not None and len(sets.base) == len(sets.references)
    return scores_row(MATCH, hits(sets.drawn), hits(sets.base) if sets.base is not None and paired_base else None)


def _distance(name: str, measure: Callable[[Tensor, Tensor], float], sets: ImageFeatures) -> Row:
    if min(len(sets.drawn), len(sets.references)) < 2:
        return Row(name, "lower", missing="a distance needs 2 drawn images and 2 references or more")
    return _against(name, "lower", measure, _without_single_base(sets), sets.references)


def _nearest_training(sets: ImageFeatures) -> Row:
    training = sets.training
    if training is None:
        return Row(NEAREST, "as the references", missing="connect the training images")
    unseen = _unseen(sets)
    real = nearest_cosines(unseen, training) if len(unseen) else None
    base = nearest_cosines(sets.base, training) if sets.base is not None else None
    return scores_row(NEAREST, nearest_cosines(sets.drawn, training), base, real, "as the references")


def _nearer_to_training(sets: ImageFeatures) -> Row:
    training, unseen = sets.training, _unseen(sets)
    if training is None:
        return Row(NEARER, "lower", missing="connect the training images")
    if not len(unseen):
        return Row(NEARER, "lower", missing="all references are training images; connect others")

    def nearer(images: Tensor) -> Tensor:
        return nearest_cosines(images, training) > nearest_cosines(images, unseen)

    base = nearer(sets.base).double() if sets.base is not None else None
    return scores_row(NEARER, nearer(sets.drawn).double(), base, better="lower")


def _copies(sets: ImageFeatures) -> Row:
    if sets.training is None:
        return Row(COPIES, "lower", missing="connect the training images")
    if _closest_real(sets) is None:
        return Row(COPIES, "lower", missing="connect 2 different training images or more, or other references")
    base = _copied(sets.base, sets).double() if sets.base is not None else None
    return scores_row(COPIES, _copied(sets.drawn, sets).double(), base, better="lower")


def _spread(sets: ImageFeatures) -> Row:
    if len(sets.drawn) < 2:
        return Row(SPREAD, "as the references", missing="needs 2 drawn images or more")
    real = estimate(spread, sets.references) if len(sets.references) > 1 else None
    return _against(SPREAD, "as the references", spread, _without_single_base(sets), real=real)


def _without_single_base(sets: ImageFeatures) -> ImageFeatures:
    """Leave out the base's images where one alone has no distance to others of its set."""
    return replace(sets, base=None) if sets.base is not None and len(sets.base) < 2 else sets


def _against(
    name: str,
    better: Better,
    measure: Callable[..., float],
    sets: ImageFeatures,
    *others: Tensor,
    real: Estimate | None = None,
) -> Row:
    """Return the row of a measure of (images, *others), for the drawn images and for the base's."""
    drawn = estimate(measure, sets.drawn, *others)
    if sets.base is None:
        return Row(name, better, drawn, None, real)
    base = estimate(measure, sets.base, *others)
    if len(sets.base) != len(sets.drawn):
        return Row(name, better, drawn, base, real, difference(drawn, base))

    def gain(both: Tensor, *rest: Tensor) -> float:
        return measure(both[:, 0], *rest) - measure(both[:, 1], *rest)

    both = torch.stack([sets.drawn, sets.base], 1)  # of the same prompts, so an error that both share cancels
    return Row(name, better, drawn, base, real, estimate(gain, both, *others))


# --- nearest images ---


def _nearest(sets: ImageFeatures) -> list[Nearest]:
    references = _neighbours(sets.drawn, sets.references)
    training = _neighbours(sets.drawn, sets.training) if sets.training is not None else [None] * len(references)
    copied = _copied(sets.drawn, sets).tolist()
    found = [Nearest(*each) for each in zip(range(len(references)), training, references, copied, strict=True)]
    return sorted(found, key=lambda each: -(each.training or each.reference).cosine)


def _neighbours(images: Tensor, others: Tensor) -> list[Neighbour]:
    cosines, indices = _cosines(images, others).max(1)
    return [Neighbour(index, cosine) for index, cosine in zip(indices.tolist(), cosines.tolist(), strict=True)]


def _copied(images: Tensor, sets: ImageFeatures) -> Tensor:
    """Return which images (n,) seem to be copies of training images.

    These are nearer to a training image than to any unseen reference, and nearer than any two different real images of
    the style are to each other.
    """
    closest = _closest_real(sets)
    if sets.training is None or closest is None:
        return torch.zeros(len(images), dtype=torch.bool)
    unseen = _unseen(sets)
    to_training = nearest_cosines(images, sets.training)
    copied = to_training > closest
    return copied & (to_training > nearest_cosines(images, unseen)) if len(unseen) else copied


def _closest_real(sets: ImageFeatures) -> float | None:
    """Return the highest cosine of a training image and another real image of the style; None if there is none."""
    if sets.training is None:
        return None
    cosines = _cosines(sets.training, torch.cat([sets.training, sets.references]))
    different = cosines[cosines < _SAME_IMAGE]
    return different.max().item() if len(different) else None


def _unseen(sets: ImageFeatures) -> Tensor:
    """Return the references that are no training images."""
    if sets.training is None:
        return sets.references
    return sets.references[nearest_cosines(sets.references, sets.training) < _SAME_IMAGE]


# --- helpers ---


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Return the mean cosine (-1..1) over all pairs of an image of the first set and one of the second."""
    return _cosines(first, second).mean().item()


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _mean_of(values: Tensor | None) -> Estimate | None:
    return estimate(_mean, values) if values is not None else None


def _scaled(features: ImageFeatures) -> ImageFeatures:
    """Scale every row to the length √d, so that its values are about 1."""
    width = features.drawn.shape[-1]
    for name, rows in vars(features).items():
        if rows is None:
            continue
        if rows.ndim != 2 or rows.shape[1] != width or not rows.numel():
            raise ValueError(f"{name} must have a row of {width} features for each image: {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise ValueError(
                f"The features of {name} hold NaN or infinity. The network may have overflowed: load it in fp32."
            )
    scaled = {
        name: F.normalize(rows.double(), dim=1) * math.sqrt(width)
        for name, rows in vars(features).items()
        if rows is not None
    }
    return ImageFeatures(**scaled)
