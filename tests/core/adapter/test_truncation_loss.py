"""Truncations in reports: their rule as data, and its spelling in files."""

import math

import pytest

from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss

LOSS = TruncationLoss(Truncation("fixed", 4), 4.0, 750_000, 0.45, 0.01, True)


@pytest.mark.parametrize(
    ("truncation", "name"),
    [
        (Truncation("whole"), "whole"),
        (Truncation("signal"), "signal"),
        (Truncation("fixed", 1), "rank 1"),
        (Truncation("fixed", 4096), "rank 4096"),
        *((Truncation("energy", share), f"energy {share:.0%}") for share in (0.8, 0.9, 0.95, 0.99)),
        (Truncation("energy", 0.995), "energy 99.5%"),
        (Truncation("other", label="by hand"), "by hand"),
    ],
)
def test_a_rule_is_spelled_as_in_files_of_0_3_0_and_read_back_exactly(truncation, name):
    assert truncation.name == name
    assert Truncation.from_name(name) == truncation


@pytest.mark.parametrize("name", ["", "rank", "rank x", "rank 4 of 8", "energy", "energy 2", "Whole", "rank 1e9"])
def test_a_name_of_no_known_rule_keeps_its_spelling(name):
    assert Truncation.from_name(name) == Truncation("other", label=name)
    assert Truncation.from_name(name).name == name


def test_a_loss_has_the_layout_of_files_of_0_3_0():
    stored = {"name": "rank 4", "mean_rank": 4.0, "size": 750_000, "loss": 0.45, "error": 0.01, "chosen": True}
    assert LOSS.to_dict() == stored
    assert TruncationLoss.from_dict(stored) == LOSS


def test_null_is_read_as_nan():
    stored = {**LOSS.to_dict(), "loss": None}
    assert math.isnan(TruncationLoss.from_dict(stored).loss)


@pytest.mark.parametrize("size", [-1, 2**63])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match="no number of bytes"):
        TruncationLoss.from_dict({**LOSS.to_dict(), "size": size})
