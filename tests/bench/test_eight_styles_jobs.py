"""bench.eight_styles: what the plans contain, and which of their jobs are selected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from aclora_core.config import TrainConfig
from bench.eight_styles import explore, plan, result_files
from bench.eight_styles.__main__ import PLANS, selected
from bench.eight_styles.jobs import Job
from bench.eight_styles.libraries import METHODS
from bench.eight_styles.scores import REFERENCES, Cell

STYLES = ("one", "two", "three")


def lines_of(jobs: list[Job], style: str, seed: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(job.name, job.marks) for job in jobs if (job.style, job.seed) == (style, seed)]


@pytest.mark.parametrize("name", PLANS)
def test_every_style_has_the_same_lines_and_later_seeds_no_others(name: str) -> None:
    jobs = [job for job in PLANS[name](STYLES, plan.SEEDS) if job.kind in ("training", "library")]
    for seed in plan.SEEDS:
        first, *others = (lines_of(jobs, style, seed) for style in STYLES)
        assert first and all(lines == first for lines in others)
        assert set(first) <= set(lines_of(jobs, STYLES[0], plan.SEEDS[0]))


@pytest.mark.parametrize("name", PLANS)
def test_the_grid_has_every_rank_with_every_seed(name: str) -> None:
    jobs = [job for job in PLANS[name](STYLES, plan.SEEDS) if job.name.startswith("rank ")]
    names = [{job.name for job in jobs if job.seed == seed} for seed in plan.SEEDS]
    assert names[0] and all(found == names[0] for found in names)


@pytest.mark.parametrize("name", PLANS)
def test_nothing_is_measured_twice(name: str) -> None:
    jobs = PLANS[name](STYLES, plan.SEEDS)
    cells = Counter((job.name, job.style, job.seed, mark) for job in jobs for mark in job.marks or ("",))
    assert [cell for cell, count in cells.items() if count > 1] == []
    rows = Counter((job.name, job.style, job.seed, job.settings.get("steps")) for job in jobs)
    assert max(rows.values()) == 1  # as result files are joined by these


@pytest.mark.parametrize("name", PLANS)
def test_what_needs_no_training_comes_first(name: str) -> None:
    jobs = PLANS[name](STYLES, (0, 1))
    kinds = [(job.kind, job.style) for job in jobs[: 3 * len(STYLES)]]
    assert kinds == [(kind, style) for kind in ("base", "real", "vae") for style in STYLES]


@pytest.mark.parametrize("name", PLANS)
def test_every_training_draws_within_its_steps_and_its_settings_exist(name: str) -> None:
    for job in PLANS[name](STYLES[:1], (0,)):
        if job.kind == "training":
            config = TrainConfig(**{"layers": "all", **job.settings})
            assert all(mark <= config.steps for mark in job.marks)
        elif job.kind == "library":
            assert job.name in METHODS


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_has_a_reference_for_the_score(name: str) -> None:
    cells = {Cell(job.name, str(mark)) for job in PLANS[name](STYLES[:1], (0,)) for mark in job.marks}
    assert cells & set(REFERENCES)


def test_the_grid_has_every_rank_at_every_step() -> None:
    found = {(job.settings["max_rank"], mark) for job in plan.grid(["one"], 0) for mark in job.marks}
    assert found == {(rank, step) for rank in plan.RANKS for step in plan.STEPS}


def test_some_lines_are_watched_for_the_rules_of_the_stop() -> None:
    watched = [job for job in explore.jobs(["one"], [0]) if job.watched]
    assert watched and all(len(job.marks) > 5 for job in watched)


def test_selected_jobs_come_in_the_order_of_the_patterns_and_only_once() -> None:
    jobs = [Job("training", name, style) for name in ("rank 2", "rank 16", "plain") for style in ("one", "two")]
    found = selected(jobs, ["plain", "rank 1*", "rank *"])
    assert [job.name for job in found] == ["plain", "plain", "rank 16", "rank 16", "rank 2", "rank 2"]
    assert [job.style for job in found[:2]] == ["one", "two"]
    assert selected(jobs, None) == jobs and selected(jobs, ["nothing"]) == []


def test_a_row_names_the_number_of_images_only_where_it_is_unusual() -> None:
    assert "images" not in Job("training", "plain", "one").row()
    assert Job("training", "plain", "one", images=8).row()["images"] == 8


def test_jobs_whose_row_is_in_a_result_file_are_not_run_again(tmp_path: Path) -> None:
    done, failed, new = (Job("training", "rank 16", "one", seed, {"steps": 640}) for seed in range(3))
    longer = Job("training", "rank 16", "one", 0, {"steps": 2400})
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"data": "d", "rows": [done.row(), {**failed.row(), "error": "out of memory"}]}))
    assert result_files.missing([done, failed, new, longer], [path]) == [failed, new, longer]
