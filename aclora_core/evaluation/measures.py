"""Measures of drawn images, computed from the features and logits that a network gives for them.

Every tensor has one row for each image. All functions compute in float64 and are pure. "Real" images are test images:
the real images of the concepts that were drawn, none of which is a training image.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = 32
_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0


# --- from logits ---


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each image's right label among all labels.

    Args:
        logits: (n, labels).
        labels: (n,), the index of each image's right label.

    Returns:
        (n,) int64; 1 where the right label has the highest logit. Equal logits rank before the right label, so a
        network that gives the same logit to every label is right about none.

    Raises:
        ValueError: the shapes do not fit, a label has no logit, or there are no images.
    """
    values = _rows(logits, "logits")
    if labels.shape != (len(values),):
        raise ValueError(f"labels must have the shape ({len(values)},), one for each row of logits: {labels.shape}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < values.shape[1]:
        raise ValueError(
            f"labels must be indices of the {values.shape[1]} logits of an image; they are {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    own = values.gather(1, labels.long()[:, None])
    return (values >= own).sum(1)


def share_within(ranks: Tensor, first: int) -> float:
    """Return the share (0..1) of the ranks (n,) that are at most `first`: top-1 or top-5 accuracy."""
    return (ranks <= first).double().mean().item()


def style_share(logits: Tensor, style: int) -> float:
    """Return the share (0..1) of the images, logits (n, styles), that a classifier takes for one style.

    Raises:
        ValueError: there is no such style, or there are no images.
    """
    return share_within(label_ranks(logits, torch.full((len(logits),), style, device=logits.device)), 1)


# --- from features ---


def likeness(drawn: Tensor, real: Tensor) -> float:
    """Return the mean cosine (-1..1) between each drawn image and the real image of what was asked for.

    DINO and CLIP-I of DreamBooth (Ruiz et al. 2023, arXiv 2208.12242) are means of this kind, over all pairs of images
    of one subject. Here every prompt has one right image, so only those pairs count. A row of zeros has the cosine 0.

    Args:
        drawn: (n, d).
        real: (n, d), in the same order.

    Raises:
        ValueError: the shapes differ, or there are no images.
    """
    a, b = _two(drawn, real)
    if len(a) != len(b):
        raise ValueError(f"likeness compares image by image, but there are {len(a)} drawn and {len(b)} real images")
    return F.cosine_similarity(a, b).mean().item()


def kid(drawn: Tensor, real: Tensor) -> float:
    """Return the kernel distance of two sets of images, as the Kernel Inception Distance defines it.

    The unbiased estimate of MMD² with the kernel k(x, y) = (xᵀy / d + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401):
    mean k(a, a') + mean k(b, b') - 2 mean k(a, b) over pairs of different images (Gretton et al. 2012, JMLR 13, Eq. 3).
    It assumes no Gaussian and needs few images. For two samples of one distribution it is 0 on average, so it is
    often negative, and always for a set and itself.

    Args:
        drawn: (n, d), at least 2 rows.
        real: (m, d), at least 2 rows.

    Raises:
        ValueError: the shapes do not fit, or a set has fewer than 2 images.
    """
    a, b = _two(drawn, real, least=2)
    return _unbiased_mmd(a, b, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3)


def cmmd(drawn: Tensor, real: Tensor) -> float:
    """Return 1000 times the MMD² of two sets of images with a Gaussian kernel on features of unit length.

    k(x, y) = exp(-‖x - y‖² / (2 · 10²)), width and factor as in CMMD (Jayasumana et al. 2024, arXiv 2401.09603).
    Theirs uses CLIP's features and counts each image's similarity to itself; here that is left out, as in `kid`, since
    with few images it would add a bias to every distance.

    Args:
        drawn: (n, d), at least 2 rows.
        real: (m, d), at least 2 rows.

    Raises:
        ValueError: the shapes do not fit, or a set has fewer than 2 images.
    """
    a, b = _two(drawn, real, least=2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
        return torch.exp(-squared / (2 * _CMMD_SIGMA**2))

    return _CMMD_SCALE * _unbiased_mmd(F.normalize(a, dim=1), F.normalize(b, dim=1), kernel)


def frechet(drawn: Tensor, real: Tensor, directions: int = DIRECTIONS) -> float:
    """Return the Fréchet distance of two sets of images along the leading directions of the real one.

    ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), as in FID (Heusel et al. 2017, arXiv 1706.08500), in squared units of the
    features. A covariance in d dimensions needs many more than d images, and there are some 100. So both sets are
    projected onto the principal directions of the real features, which are the same for every method that is compared.
    What lies outside of them is not seen; `kid` sees all directions.

    Args:
        drawn: (n, d), n > directions.
        real: (m, d), m > directions.
        directions: number of principal directions of the real features.

    Raises:
        ValueError: the shapes do not fit, or the images are too few, or too equal, for so many directions.
    """
    a, b = _two(drawn, real)
    _, sizes, rows = torch.linalg.svd(b - b.mean(0), full_matrices=False)
    rank = int((sizes > torch.finfo(b.dtype).eps * max(b.shape) * b.norm()).sum())
    most = min(len(a) - 1, rank)
    if not 1 <= directions <= most:
        raise ValueError(
            f"directions must be at least 1 and at most {most}: {directions}. There are {len(a)} drawn images, and the "
            f"{len(b)} real ones differ in {rank} directions. Use more images or fewer directions."
        )
    basis = rows[:directions].T
    means = (a.mean(0) - b.mean(0)) @ basis
    root_a, root_b = _covariance_root(a @ basis), _covariance_root(b @ basis)
    # The eigenvalues of Σ₁ Σ₂ are the squared singular values of R₁ R₂ᵀ, where Σ = RᵀR.
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    total = means.square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, total.item())


def spread(drawn: Tensor) -> float:
    """Return the mean cosine distance (0..2) over all pairs of drawn images (n, d): 0 when all are the same.

    Compare it with that of the real images. A row of zeros has the distance 1 to every other.

    Raises:
        ValueError: there are fewer than 2 images.
    """
    unit = F.normalize(_rows(drawn, "drawn", least=2), dim=1)
    return 1 - _mean_off_diagonal(unit @ unit.T)


def nearest_cosines(features: Tensor, others: Tensor) -> Tensor:
    """Return the cosine (n,) of each image, features (n, d), to the one of the others (k, d) that it resembles most.

    Raises:
        ValueError: the shapes do not fit, or there are no images.
    """
    a, b = _two(features, others, names=("features", "others"))
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).amax(1)


@dataclass(frozen=True)
class Copies:
    """How near images come to the training images: mean cosines to the nearest one, and shares."""

    drawn: float
    base: float  # of what the base draws without an adapter: nearness that no training has caused
    real: float  # of the real test images: nearness that the style alone causes
    share: float  # of the drawn images that are nearer to a training image than to every real test image; 1: all copied
    base_share: float  # the same of what the base draws


def copies(drawn: Tensor, training: Tensor, base: Tensor, real: Tensor) -> Copies:
    """Compare the nearness of drawn images to the training images with that of the base's and of real test images.

    The other measures do not see memorised training images. The similarity to the nearest one is the usual test
    (Somepalli et al. 2023, arXiv 2212.03860), but a copy that is a little soft or noisy is far from everything. The
    share therefore compares two similarities of the same image, to training and to test images (after Meehan et al.
    2020, arXiv 2004.05675). By chance it is about k / (k + m), and less when the asked concepts are drawn.

    Args:
        drawn: (n, d).
        training: (k, d), the images that the adapter was trained on.
        base: (b, d), what the base draws for the same prompts.
        real: (m, d), in the style, without any training image.

    Raises:
        ValueError: the shapes do not fit, or a set has no images.
    """
    return Copies(
        drawn=nearest_cosines(drawn, training).mean().item(),
        base=nearest_cosines(base, training).mean().item(),
        real=nearest_cosines(real, training).mean().item(),
        share=_nearer_share(drawn, training, real),
        base_share=_nearer_share(base, training, real),
    )


def _nearer_share(images: Tensor, training: Tensor, real: Tensor) -> float:
    nearer = nearest_cosines(images, training) > nearest_cosines(images, real)
    return nearer.double().mean().item()


# --- one number ---


class Quality(NamedTuple):
    """The four measures that the score combines."""

    style: float  # share of the drawn images with the style
    concept_in_five: float  # share with the right concept among the first five
    likeness: float
    distance: float  # never negative, 0 is best: frechet, not kid or cmmd


def score(found: Quality, reference: Quality) -> float:
    """Return the mean ratio of four measures to a reference; above 1 is better than the reference.

    (style + concept in five + likeness, each divided by the reference's, + reference's distance / distance) / 4. It
    imitates AC-LoRA (arXiv 2504.02231), which averages its improvement over FID, CLIP, DINO and ImageReward.
    The score does not see copies: read `copies` next to it. The reference should be a trained adapter, as the base's
    share of the style is close to 0 and its ratio would outweigh the others. A distance of 0, as the real images have
    to themselves, gives infinity.

    Raises:
        ValueError: a measure is not finite, the distance is negative, or a measure of the reference is not above 0.
    """
    for name, value in reference._asdict().items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"The reference's {name} is {value:g}, and no ratio to it can be formed. Choose a reference with a "
                "measure above 0, such as a trained adapter."
            )
    for name, value in found._asdict().items():
        if not math.isfinite(value):
            raise ValueError(f"The {name} is {value:g}; the score needs finite measures.")
    if found.distance < 0:
        raise ValueError(f"The distance is {found.distance:g}; the score needs one that is never negative: frechet.")
    inverted = reference.distance / found.distance if found.distance else math.inf
    ratios = (
        found.style / reference.style,
        found.concept_in_five / reference.concept_in_five,
        found.likeness / reference.likeness,
        inverted,
    )
    return statistics.fmean(ratios)


# --- helpers ---


def _rows(values: Tensor, name: str, least: int = 1) -> Tensor:
    """Return a matrix in float64, or raise ValueError if it is none, has too few rows or is not finite."""
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} must have the shape (images, values): {tuple(values.shape)}")
    if len(values) < least:
        raise ValueError(f"{name} must have at least {least} rows, one for each image: {len(values)}")
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite; there is NaN or infinity in {_bad_rows(values)} of its rows")
    return values.double()


def _bad_rows(values: Tensor) -> int:
    return int((~values.isfinite()).any(1).sum())


def _two(
    first: Tensor, second: Tensor, least: int = 1, names: tuple[str, str] = ("drawn", "real")
) -> tuple[Tensor, Tensor]:
    """Return two matrices of the same width in float64."""
    a, b = _rows(first, names[0], least), _rows(second, names[1], least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names[0]} has {a.shape[1]} features and {names[1]} {b.shape[1]}; both must come from the same network"
        )
    return a, b


def _unbiased_mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    return _mean_off_diagonal(kernel(a, a)) + _mean_off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean().item()


def _mean_off_diagonal(square: Tensor) -> float:
    count = len(square) * (len(square) - 1)
    return ((square.sum() - square.trace()) / count).item()


def _covariance_root(points: Tensor) -> Tensor:
    """Return R (k, k) with RᵀR = the covariance of points (n, k)."""
    centred = (points - points.mean(0)) / math.sqrt(len(points) - 1)
    return torch.linalg.qr(centred, mode="r").R
