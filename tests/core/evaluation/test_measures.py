"""aclora_core.evaluation: the measures put planted cases into the order that they must have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aclora_core import evaluation as measures
from aclora_core.evaluation import Quality, score

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED, TRAINED = 48, 16  # concepts that are drawn, and other ones that were trained on
STYLE, BASE_STYLE = 0, 1
DIRECTIONS = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# --- planted cases ---

CONCEPTS = F.normalize(random(ASKED + TRAINED, 24), dim=1)
STYLES = torch.eye(8, dtype=torch.float64)[:3]


def images_of(concepts: Tensor, styles: Tensor, noise: float, seed: int) -> Tensor:
    """Return features in which a concept and a style can be read, plus noise."""
    clean = torch.cat([CONCEPTS[concepts], STYLES[styles]], 1)
    return clean + noise * random(*clean.shape, seed=seed)


def in_style(concepts: Tensor, style: int, noise: float, seed: int) -> Tensor:
    return images_of(concepts, torch.full_like(concepts, style), noise, seed)


LABELS = torch.arange(ASKED)
TRAINING = in_style(torch.arange(ASKED, ASKED + TRAINED), STYLE, 0.05, 1)
REAL = in_style(LABELS, STYLE, 0.05, 2)
HALF_LEARNED = images_of(LABELS, torch.where(LABELS % 2 == 0, STYLE, BASE_STYLE), 0.1, 3)
DRAWN = {
    "noise": 0.25 * random(ASKED, 32, seed=4),
    "base": in_style(LABELS, BASE_STYLE, 0.1, 5),
    "copies": TRAINING.repeat(3, 1) + 0.01 * random(ASKED, 32, seed=6),
    "real": in_style(LABELS, STYLE, 0.05, 7),  # the asked images, drawn anew
}


def quality(drawn: Tensor) -> Quality:
    ranks = measures.label_ranks(drawn[:, :24] @ CONCEPTS.T, LABELS)
    return Quality(
        style=measures.style_share(drawn[:, 24:] @ STYLES[:, : drawn.shape[1] - 24].T, STYLE),
        concept_in_five=measures.share_within(ranks, 5),
        likeness=measures.likeness(drawn, REAL),
        distance=measures.frechet(drawn, REAL, DIRECTIONS),
    )


def test_the_score_puts_the_planted_cases_in_order() -> None:
    reference = quality(HALF_LEARNED)
    scores = {name: score(quality(drawn), reference) for name, drawn in DRAWN.items()}
    assert sorted(scores, key=scores.__getitem__) == ["noise", "base", "copies", "real"]
    assert scores["base"] < 1 < scores["real"]


def test_each_measure_sees_what_it_is_for() -> None:
    found = {name: quality(drawn) for name, drawn in DRAWN.items()}
    assert found["copies"].style == found["real"].style == 1 and found["base"].style == 0
    assert found["base"].concept_in_five == found["real"].concept_in_five == 1
    assert found["copies"].concept_in_five < 0.3 and found["noise"].concept_in_five < 0.3
    assert found["noise"].likeness < found["copies"].likeness < found["real"].likeness
    assert found["noise"].likeness < found["base"].likeness < found["real"].likeness
    assert found["real"].distance < 0.5 * min(found[name].distance for name in ("noise", "base", "copies"))


@pytest.mark.parametrize("distance", [measures.kid, measures.cmmd], ids=["kid", "cmmd"])
def test_distances_of_sets_put_the_planted_cases_in_order(distance: Callable[[Tensor, Tensor], float]) -> None:
    found = {name: distance(drawn, REAL) for name, drawn in DRAWN.items()}
    assert found["real"] < found["copies"] < min(found["base"], found["noise"])


def test_copies_are_caught_although_their_style_is_perfect() -> None:
    base = DRAWN["base"]
    found = {name: measures.copies(drawn, TRAINING, base, REAL) for name, drawn in DRAWN.items()}
    caught = found.pop("copies")
    assert caught.share == 1 and caught.drawn > 0.99
    assert caught.base < caught.real < caught.drawn
    chance = TRAINED / (TRAINED + ASKED)
    assert all(other.share < chance + 0.2 for other in found.values())
    assert found["real"].share == found["base"].share == caught.base_share == 0
    assert found["base"].drawn == found["base"].base == caught.base


def test_soft_copies_are_caught_although_they_are_far_from_everything() -> None:
    """Softness is a feature of its own, which only drawn images have."""

    def with_softness(images: Tensor, amount: float) -> Tensor:
        return F.pad(images, (0, 1), value=amount)

    training, base, real = (with_softness(images, 0.0) for images in (TRAINING, DRAWN["base"], REAL))
    found = measures.copies(with_softness(DRAWN["copies"], 3.0), training, base, real)
    assert found.drawn < found.real and found.share == 1
    assert measures.copies(with_softness(DRAWN["real"], 3.0), training, base, real).share == 0


def test_few_copies_among_many_images_are_counted() -> None:
    some = torch.cat([DRAWN["copies"][:12], DRAWN["base"][12:]])
    assert measures.copies(some, TRAINING, DRAWN["base"], REAL).share == 0.25


def test_spread_falls_as_images_become_alike() -> None:
    mixed = 0.5 * REAL + 0.5 * REAL.mean(0)
    assert measures.spread(mixed) < measures.spread(REAL)
    assert measures.spread(REAL[:1].repeat(5, 1)) == pytest.approx(0, abs=1e-12)


# --- against other computations ---


def test_ranks_count_the_labels_before_the_right_one() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    ranks = measures.label_ranks(logits, torch.tensor([1, 2, 0]))
    assert ranks.tolist() == [1, 2, 3]
    assert measures.share_within(ranks, 1) == pytest.approx(1 / 3)
    assert measures.share_within(ranks, 2) == pytest.approx(2 / 3)


def test_a_network_that_says_the_same_of_every_label_is_right_about_none() -> None:
    assert measures.label_ranks(torch.zeros(2, 12), torch.tensor([0, 5])).tolist() == [12, 12]
    assert measures.style_share(torch.zeros(2, 12), 0) == 0


def test_likeness_is_the_mean_cosine_of_the_pairs() -> None:
    drawn = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    real = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert measures.likeness(drawn, real) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_spread_is_the_mean_cosine_distance_of_the_pairs() -> None:
    drawn = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert measures.spread(drawn) == pytest.approx((1 + 2 * (1 - math.sqrt(0.5))) / 3)


def brute_force_mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], float]) -> float:
    """MMD² pair by pair, as Gretton et al. 2012 write it in Eq. 3."""
    total = 0.0
    for points in (a, b):
        pairs = list(itertools.permutations(points, 2))
        total += sum(kernel(x, y) for x, y in pairs) / len(pairs)
    return total - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kid_equals_the_sum_over_pairs() -> None:
    a, b = random(7, 4), random(5, 4, seed=1) + 0.5
    expected = brute_force_mmd(a, b, lambda x, y: (float(x @ y) / 4 + 1) ** 3)
    assert measures.kid(a, b) == pytest.approx(expected, rel=1e-12)


def test_cmmd_equals_the_sum_over_pairs() -> None:
    a, b = F.normalize(random(7, 4), dim=1), F.normalize(random(5, 4, seed=1) + 0.5, dim=1)
    expected = 1000 * brute_force_mmd(a, b, lambda x, y: math.exp(-float((x - y).square().sum()) / 200))
    assert measures.cmmd(3 * a, 2 * b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", [measures.kid, measures.cmmd], ids=["kid", "cmmd"])
def test_two_samples_of_one_distribution_have_no_distance(distance: Callable[[Tensor, Tensor], float]) -> None:
    found = torch.tensor([distance(random(20, 16, seed=2 * k), random(30, 16, seed=2 * k + 1)) for k in range(100)])
    error = found.std() / math.sqrt(len(found))
    assert found.mean().abs() < 3 * error
    assert (found < 0).any() and (found > 0).any()
    assert distance(random(20, 16) + 1, random(30, 16, seed=1)) > 5 * found.std()


def with_moments(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Return a sample (count, k) whose mean and covariance are exactly these."""
    sample = random(count, len(mean), seed=seed)
    white = torch.linalg.qr(sample - sample.mean(0)).Q * math.sqrt(count - 1)
    return white @ torch.linalg.cholesky(covariance).T + mean


def matrix_root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def test_frechet_is_the_closed_form_of_two_gaussians() -> None:
    means = random(2, 5)
    roots = [random(5, 5, seed=seed) for seed in (1, 2)]
    first, second = (root @ root.T + 0.1 * torch.eye(5, dtype=torch.float64) for root in roots)
    half = matrix_root(first)
    expected = (means[0] - means[1]).square().sum() + (first + second - 2 * matrix_root(half @ second @ half)).trace()
    found = measures.frechet(with_moments(means[0], first, 40, 3), with_moments(means[1], second, 30, 4), directions=5)
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_in_one_direction_is_that_of_mean_and_deviation() -> None:
    drawn = with_moments(torch.tensor([3.0]).double(), torch.tensor([[4.0]]).double(), 10, 0)
    real = with_moments(torch.tensor([1.0]).double(), torch.tensor([[9.0]]).double(), 12, 1)
    assert measures.frechet(drawn, real, directions=1) == pytest.approx((3 - 1) ** 2 + (2 - 3) ** 2)


def test_frechet_looks_along_the_leading_directions_of_the_real_images() -> None:
    real = random(40, 3) * torch.tensor([5.0, 3.0, 0.1])
    assert measures.frechet(real, real, 2) == pytest.approx(0, abs=1e-10)
    outside, inside = (real + torch.eye(3, dtype=torch.float64)[axis] for axis in (2, 1))
    assert measures.frechet(outside, real, 2) < 0.01
    assert measures.frechet(inside, real, 2) == pytest.approx(1, abs=0.01)
    assert measures.frechet(outside, real, 3) == pytest.approx(1, abs=1e-9)


def test_measures_compute_in_float64() -> None:
    a, b = ((100 + random(20, 16, seed=seed)).half() for seed in (0, 1))
    for measure in (measures.kid, measures.cmmd, measures.likeness):
        assert measure(a, b) == measure(a.double(), b.double())
    assert measures.frechet(a, b, 8) == measures.frechet(a.double(), b.double(), 8)


# --- the score ---

SOME = Quality(style=0.5, concept_in_five=0.8, likeness=0.7, distance=45.0)


def test_the_reference_itself_has_the_score_one() -> None:
    assert score(SOME, SOME) == 1


@pytest.mark.parametrize(
    ("better", "expected"),
    [
        (SOME._replace(style=1.0), 1.25),
        (SOME._replace(concept_in_five=1.0), 1.0625),
        (SOME._replace(likeness=1.4), 1.25),
        (SOME._replace(distance=22.5), 1.25),
        (SOME._replace(distance=90.0), 0.875),
    ],
)
def test_each_measure_counts_a_quarter(better: Quality, expected: float) -> None:
    assert score(better, SOME) == pytest.approx(expected)


def test_a_distance_of_zero_gives_infinity() -> None:
    assert score(SOME._replace(distance=0.0), SOME) == math.inf


def test_a_score_that_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="reference's style is 0"):
        score(SOME, SOME._replace(style=0.0))
    with pytest.raises(ValueError, match="reference's distance is -1"):
        score(SOME, SOME._replace(distance=-1.0))
    with pytest.raises(ValueError, match="never negative: frechet"):
        score(SOME._replace(distance=-0.01), SOME)
    with pytest.raises(ValueError, match="likeness is nan"):
        score(SOME._replace(likeness=math.nan), SOME)


# --- degenerate input ---


@pytest.mark.parametrize(
    "measure",
    [
        lambda one: measures.kid(one, REAL),
        lambda one: measures.kid(REAL, one),
        lambda one: measures.cmmd(one, REAL),
        measures.spread,
    ],
)
def test_one_image_is_too_few_for_a_distance_between_images(measure: Callable[[Tensor], float]) -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        measure(REAL[:1])


def test_one_image_has_a_likeness_and_a_nearest_training_image() -> None:
    assert measures.likeness(REAL[:1], REAL[:1]) == pytest.approx(1)
    assert measures.copies(TRAINING[:1], TRAINING, REAL[:1], REAL).share == 1


def test_too_few_or_equal_images_for_the_directions_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 15: 16. There are 16 drawn images"):
        measures.frechet(REAL[:16], REAL, 16)
    with pytest.raises(ValueError, match="real ones differ in 0 directions"):
        measures.frechet(REAL, REAL[:1].repeat(ASKED, 1), 1)
    with pytest.raises(ValueError, match="at least 1"):
        measures.frechet(REAL, REAL, 0)


def test_equal_drawn_images_have_a_distance() -> None:
    """All drawn images are the real mean: the distance is the real variance."""
    drawn = REAL.mean(0).repeat(ASKED, 1)
    variance = torch.linalg.eigvalsh(REAL.T.cov())[-DIRECTIONS:].sum().item()
    assert measures.frechet(drawn, REAL, DIRECTIONS) == pytest.approx(variance)
    assert measures.kid(drawn, drawn) == pytest.approx(0, abs=1e-12)
    assert measures.kid(REAL, REAL) < 0


def test_a_row_of_zeros_resembles_nothing() -> None:
    nothing = torch.zeros(3, 32)
    assert measures.likeness(nothing, REAL[:3]) == 0
    assert measures.spread(nothing) == 1


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="48 drawn and 47 real images"):
        measures.likeness(REAL, REAL[1:])
    with pytest.raises(ValueError, match="drawn has 31 features and real 32; both must come from the same network"):
        measures.kid(REAL[:, 1:], REAL)
    with pytest.raises(ValueError, match=r"drawn must have the shape \(images, values\): \(32,\)"):
        measures.spread(REAL[0])
    with pytest.raises(ValueError, match="in 1 of its rows"):
        measures.likeness(torch.cat([REAL[1:], torch.full((1, 32), math.nan)]), REAL)
    with pytest.raises(ValueError, match="at least 1 rows"):
        measures.nearest_cosines(REAL[:0], TRAINING)
    with pytest.raises(ValueError, match="they are 0 to 3"):
        measures.label_ranks(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="they are 12 to 12"):
        measures.style_share(torch.zeros(2, 12), 12)
    with pytest.raises(ValueError, match=r"labels must have the shape \(2,\)"):
        measures.label_ranks(torch.zeros(2, 3), torch.tensor([0]))
