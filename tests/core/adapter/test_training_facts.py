"""Facts about a training run: their types and their layout in files."""

import pytest

from aclora_core.adapter.training_facts import FACT_NAMES, TrainingFacts

FACTS = TrainingFacts(images=12, held_out_images=0, seconds_run=1.5, cancelled="cutting", notes="The disk was full.")


def test_unknown_facts_are_left_out_of_files():
    assert TrainingFacts().to_dict() == {}
    assert FACTS.to_dict() == {
        "images": 12,
        "held_out_images": 0,
        "seconds_run": 1.5,
        "cancelled": "cutting",
        "notes": "The disk was full.",
    }


def test_facts_come_back_from_a_file():
    assert TrainingFacts.from_dict(FACTS.to_dict()) == FACTS


def test_settings_beside_the_facts_are_ignored():
    stored = {"steps": 600, "optimizer": "AdamW", **FACTS.to_dict(), "epochs": None}
    assert TrainingFacts.from_dict(stored) == FACTS


def test_a_fact_never_has_the_name_of_a_setting():
    from aclora_core.config import TrainConfig

    assert not set(FACT_NAMES) & set(TrainConfig.__dataclass_fields__)


def test_numbers_are_read_as_the_type_of_their_fact():
    facts = TrainingFacts.from_dict({"started_at": 1700000000, "resolution": 1024})
    assert isinstance(facts.started_at, float) and facts.resolution == "1024"


@pytest.mark.parametrize("stored", [{"best_step": "soon"}, {"images": []}, {"cancelled": "at noon"}])
def test_a_fact_of_the_wrong_type_is_refused(stored):
    with pytest.raises((TypeError, ValueError)):
        TrainingFacts.from_dict(stored)
