"""aclora_core.evaluation: planted cases get the verdict that they must have; rows against other computations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aclora_core.evaluation import (
    Evaluation,
    ImageFeatures,
    Row,
    evaluate,
    evaluation_json,
    evaluation_lines,
    evaluation_table,
    scores_row,
    verdict,
)
from aclora_core.evaluation.evaluate import COPIES, MATCH, NEARER, NEAREST, PAIRED, SIMILARITY, SPREAD, mean_cosine

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED, TRAINED = 16, 12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Features in which a concept (24 values) and a style (4 values) can be read.
CONCEPTS = F.normalize(random(ASKED + TRAINED, 24), dim=1)
STYLES = torch.eye(4)


def images(concepts: Tensor, style: int, noise: float, seed: int) -> Tensor:
    clean = torch.cat([concepts, STYLES[style].expand(len(concepts), -1)], 1)
    return clean + noise * random(*clean.shape, seed=seed)


REFERENCES = images(CONCEPTS[:ASKED], 0, 0.05, 1)
TRAINING = images(CONCEPTS[ASKED:], 0, 0.05, 2)
BASE = images(CONCEPTS[:ASKED], 1, 0.05, 3)
LEARNED = images(CONCEPTS[:ASKED], 0, 0.08, 4)
COPIED = torch.cat([TRAINING, TRAINING[:4]]) + 0.005 * random(ASKED, 28, seed=5)
NOISE = random(ASKED, 28, seed=6)


def judged(drawn: Tensor, **others: Tensor | None) -> Evaluation:
    return evaluate(ImageFeatures(drawn, REFERENCES, **({"base": BASE, "training": TRAINING} | others)), pairs=True)


def value(found: Evaluation, name: str, column: str = "drawn") -> float:
    row = found.row(name)
    assert row is not None
    return float(getattr(row, column).value)


def test_planted_cases_get_the_order_that_they_must() -> None:
    found = {name: judged(drawn) for name, drawn in
             {"learned": LEARNED, "base": BASE, "copies": COPIED, "noise": NOISE}.items()}  # fmt: skip
    for name in (PAIRED, SIMILARITY):
        own = {case: value(each, name) for case, each in found.items()}
        assert own["noise"] < own["base"] < own["learned"]
    for name in ("CMMD", "KID"):
        own = {case: value(each, name) for case, each in found.items()}
        assert own["learned"] < own["copies"] < min(own["base"], own["noise"])
    assert value(found["learned"], MATCH) == value(found["base"], MATCH) == 1
    assert max(value(found["copies"], MATCH), value(found["noise"], MATCH)) < 0.4
    assert [value(found[case], COPIES) for case in found] == [0, 0, 1, 0]
    assert value(found["copies"], NEAREST) > 0.99 > value(found["copies"], NEAREST, "references")
    assert value(found["copies"], NEARER) == 1 and value(found["learned"], NEARER) < 0.2


def test_the_verdict_says_it_in_words() -> None:
    assert verdict(judged(LEARNED)).startswith("Closer to the real images of the same things than the base: 0.")
    assert "Its own reference is the nearest for 16 of 16 images (of the base's: 16)." in verdict(judged(LEARNED))
    assert "No copies of training images among 16 images." in verdict(judged(LEARNED))
    assert verdict(judged(NOISE)).startswith("Further from the real images of the same things than the base:")
    assert verdict(judged(BASE + 0.01 * NOISE)).startswith("No clear difference from the base:")
    assert "16 of 16 images may be copies of training images (of the base's: 0)" in verdict(judged(COPIED))
    alike = 0.1 * LEARNED + 0.9 * LEARNED.mean(0)
    assert "They resemble each other more than the references do" in verdict(judged(alike))
    style = evaluate(ImageFeatures(LEARNED, REFERENCES, BASE))
    assert verdict(style).startswith("Closer to the style than the base: 0.")
    assert "Not checked for copies: connect the training images." in verdict(style)
    alone = verdict(evaluate(ImageFeatures(LEARNED, REFERENCES)))
    assert alone.startswith("Similarity to the references: 0.") and "Connect the base model's images" in alone


def test_few_images_are_said_to_be_few() -> None:
    two = evaluate(ImageFeatures(LEARNED[:2], REFERENCES, BASE[:2]))
    assert "but 3 images or more are needed to be sure" in verdict(two)
    row = two.row(SIMILARITY)
    assert row and row.drawn and row.drawn.error is None


def test_one_image_of_each_kind_has_a_similarity_and_reasons_for_the_rest() -> None:
    found = evaluate(ImageFeatures(LEARNED[:1], REFERENCES[:1], BASE[:1], TRAINING[:1]), pairs=True)
    expected = F.cosine_similarity(LEARNED[:1].double(), REFERENCES[:1].double()).item()
    assert value(found, PAIRED) == pytest.approx(expected) and value(found, SIMILARITY) == pytest.approx(expected)
    reasons = {row.name: row.missing for row in found.rows if row.missing}
    assert set(reasons) == {"CMMD", "KID", SPREAD}
    table = evaluation_table(found, "a network")
    assert all(f"{name}: {reason}." in table for name, reason in reasons.items())


# --- against other computations ---


def unit(rows: Tensor) -> np.ndarray:
    array = rows.double().numpy()
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_rows_equal_a_computation_in_numpy() -> None:
    found = judged(LEARNED)
    drawn, references, base, training = (unit(each) for each in (LEARNED, REFERENCES, BASE, TRAINING))
    assert value(found, SIMILARITY) == pytest.approx((drawn @ references.T).mean())
    assert value(found, MATCH) == ((drawn @ references.T).argmax(1) == np.arange(ASKED)).mean()
    off = ~np.eye(ASKED, dtype=bool)
    assert value(found, SIMILARITY, "references") == pytest.approx((references @ references.T)[off].mean())
    assert value(found, PAIRED, "base") == pytest.approx((base * references).sum(1).mean())
    assert value(found, NEAREST) == pytest.approx((drawn @ training.T).max(1).mean())
    assert value(found, SPREAD) == pytest.approx(1 - (drawn @ drawn.T)[off].mean())
    kernel = lambda a, b: (a @ b.T + 1) ** 3  # noqa: E731 - (xᵀy / d + 1)³ of rows whose length is √d
    kid = kernel(drawn, drawn)[off].mean() + kernel(references, references)[off].mean()
    assert value(found, "KID") == pytest.approx(kid - 2 * kernel(drawn, references).mean())
    gains = (drawn * references).sum(1) - (base * references).sum(1)
    row = found.row(PAIRED)
    assert row and row.gain
    assert row.gain.value == pytest.approx(gains.mean())
    assert row.gain.error == pytest.approx(gains.std(ddof=1) / math.sqrt(ASKED))


def test_no_measure_depends_on_the_units_of_the_features() -> None:
    large = ImageFeatures(1000 * LEARNED, 1000 * REFERENCES, 1000 * BASE, 1000 * TRAINING)
    for row, other in zip(judged(LEARNED).rows, evaluate(large, pairs=True).rows, strict=True):
        assert row.drawn and other.drawn and row.drawn.value == pytest.approx(other.drawn.value, rel=1e-5, abs=1e-8)


def test_the_gain_of_the_same_prompts_is_surer_than_that_of_others() -> None:
    """What an image shows varies in both, and cancels in the difference."""
    same = evaluate(ImageFeatures(LEARNED, REFERENCES, BASE)).row(SIMILARITY)
    other = evaluate(ImageFeatures(LEARNED, REFERENCES, BASE[1:])).row(SIMILARITY)
    assert same and other and same.gain and other.gain
    assert same.gain.error is not None and other.gain.error is not None and same.gain.error < other.gain.error


def test_the_nearest_images_come_first_and_are_the_right_ones() -> None:
    mixed = LEARNED.clone()
    mixed[5] = TRAINING[7] + 0.001
    found = judged(mixed)
    assert found.nearest[0].drawn == 5 and found.nearest[0].training and found.nearest[0].training.index == 7
    assert [each.copied for each in found.nearest] == [True] + [False] * (ASKED - 1)
    cosines = [each.training.cosine for each in found.nearest if each.training]
    assert cosines == sorted(cosines, reverse=True)
    expected = (unit(mixed) @ unit(REFERENCES).T).argmax(1)
    assert [each.reference.index for each in found.nearest] == [expected[each.drawn] for each in found.nearest]


def test_references_that_are_training_images_do_not_hide_copies() -> None:
    both = evaluate(ImageFeatures(COPIED, torch.cat([REFERENCES, TRAINING]), BASE, TRAINING))
    assert value(both, COPIES) == 1 and value(both, NEARER) == 1
    same = evaluate(ImageFeatures(COPIED, TRAINING, BASE, TRAINING))
    row = same.row(NEARER)
    assert row and row.missing == "all references are training images; connect others"
    assert value(same, COPIES) == 1


def test_a_score_of_each_image_has_its_error_and_its_gain() -> None:
    drawn, base = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 2.0, 4.0])
    row = scores_row("score", drawn, base)
    assert row.drawn and row.base and row.gain
    assert (row.drawn.value, row.base.value, row.gain.value) == (2.5, 1.75, 0.75)
    assert row.gain.error == pytest.approx(0.25)


# --- texts ---


def test_table_lines_and_json_hold_the_same_numbers() -> None:
    found = judged(LEARNED)
    table, lines, facts = (
        evaluation_table(found, "a network"),
        evaluation_lines(found),
        evaluation_json(found, "a network"),
    )
    content = json.loads(facts)
    assert (
        table.startswith(verdict(found)) and lines.startswith(verdict(found)) and content["verdict"] == verdict(found)
    )
    assert content["images"] == {"drawn": ASKED, "references": ASKED, "base": ASKED, "training": TRAINED}
    assert content["features"] == "a network" and "Features: a network." in table
    for row in content["measures"]:
        shown = f"{row['drawn']['value']:.3f} ± {row['drawn']['error']:.3f}"
        assert f"{row['name']}" in table and shown in table and shown in lines
    assert len(content["nearest"]) == ASKED
    assert set(content["nearest"][0]) == {
        "drawn",
        "training",
        "reference",
        "copied",
    }


# --- bad input ---


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 16 drawn images and 15 references. Switch pairs off"):
        evaluate(ImageFeatures(LEARNED, REFERENCES[1:]), pairs=True)
    with pytest.raises(ValueError, match="features of base hold NaN or infinity"):
        evaluate(ImageFeatures(LEARNED, REFERENCES, torch.full_like(BASE, math.inf)))
    with pytest.raises(ValueError, match=r"references must have a row of 28 features for each image: \(16, 27\)"):
        evaluate(ImageFeatures(LEARNED, REFERENCES[:, 1:]))
    with pytest.raises(ValueError, match=r"drawn must have a row of 28 features for each image: \(0, 28\)"):
        evaluate(ImageFeatures(LEARNED[:0], REFERENCES))


def test_a_missing_row_is_not_counted_as_a_number() -> None:
    assert Row("x", "higher", missing="why").drawn is None
    assert mean_cosine(torch.zeros(2, 3), torch.ones(2, 3)) == 0
