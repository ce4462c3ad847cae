"""bench.eight_styles: what the plans contain, and which of their jobs are selected."""

from __future__ import annotations

from collections import Counter

import pytest

from aclora_core.config import TrainConfig
from bench.eight_styles import explore, plan
from bench.eight_styles.__main__ import PLANS, selected
from bench.eight_styles.jobs import Job
from bench.eight_styles.libraries import METHODS
from bench.eight_styles.scores import REFERENCES, Cell

STYLES = ("one", "two", "three")


@pytest.mark.parametrize("name", PLANS)
def test_every_style_and_seed_has_the_same_lines(name: str) -> None:
    jobs = [job for job in PLANS[name](STYLES, (0, 1)) if job.kind in ("training", "library")]
    lines = {
        (style, seed): [job.name for job in jobs if (job.style, job.seed) == (style, seed)]
        for style in STYLES
        for seed in (0, 1)
    }
    first = lines["one", 0]
    assert first and all(found == first for found in lines.values())


@pytest.mark.parametrize("name", PLANS)
def test_no_job_has_the_name_style_and_seed_of_another(name: str) -> None:
    found = Counter((job.name, job.style, job.seed) for job in PLANS[name](STYLES, plan.SEEDS))
    assert [key for key, count in found.items() if count > 1] == []


@pytest.mark.parametrize("name", PLANS)
def test_seeds_come_one_after_the_other_behind_what_needs_no_training(name: str) -> None:
    jobs = PLANS[name](STYLES, (0, 1))
    anchors = 3 * len(STYLES)
    assert {job.kind for job in jobs[:anchors]} == {"base", "real", "vae"}
    seeds = [job.seed for job in jobs[anchors:]]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1}


@pytest.mark.parametrize("name", PLANS)
def test_every_training_draws_within_its_steps_and_its_settings_exist(name: str) -> None:
    for job in PLANS[name](STYLES[:1], (0,)):
        if job.kind == "training":
            TrainConfig(**{"layers": "all", **job.settings})
            assert job.marks and max(job.marks) <= job.settings["steps"]
        elif job.kind == "library":
            assert job.name in METHODS


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_has_a_reference_for_the_score(name: str) -> None:
    cells = {Cell(job.name, str(mark)) for job in PLANS[name](STYLES[:1], (0,)) for mark in job.marks}
    assert cells & set(REFERENCES)


def test_the_grid_has_every_rank_at_every_step() -> None:
    found = {(job.settings["max_rank"], mark) for job in plan.grid(["one"], 0) for mark in job.marks}
    assert found == {(rank, step) for rank in plan.RANKS for step in plan.STEPS}


def test_watched_lines_are_measured_where_the_rules_for_the_stop_look() -> None:
    watched = [job for job in explore.jobs(["one"], [0]) if job.watched]
    assert watched and all(job.marks == explore.WATCHED_STEPS for job in watched)


def test_selected_jobs_come_in_the_order_of_the_patterns_and_only_once() -> None:
    jobs = [Job("training", name, style) for name in ("rank 2", "rank 16", "plain") for style in ("one", "two")]
    found = selected(jobs, ["plain", "rank 1*", "rank *"])
    assert [job.name for job in found] == ["plain", "plain", "rank 16", "rank 16", "rank 2", "rank 2"]
    assert [job.style for job in found[:2]] == ["one", "two"]
    assert selected(jobs, None) == jobs and selected(jobs, ["nothing"]) == []


def test_a_row_names_the_number_of_images_only_where_it_is_unusual() -> None:
    assert "images" not in Job("training", "plain", "one").row()
    assert Job("training", "plain", "one", images=8).row()["images"] == 8
