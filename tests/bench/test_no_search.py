"""bench.no_search: the choice of images, the order of the jobs and the evaluation of the results."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aclora_core.config.train_config import TrainConfig
from bench import pool
from bench.no_search import __main__ as no_search
from bench.no_search import images, tables
from bench.no_search.jobs import Job, marks_up_to, ordered
from bench.no_search.verdict import Results, join, spread_over_seeds
from bench.pool import Row, gpus
from bench.result_file import finite
from tests.support.icon_packs import BLACK_SQUARE, pack
from tools.tiny_base import icons

LOSSES = {  # of rank 1, 2 and 4 after 10 and 20 steps, when the base loses 2.0
    1: {10: 1.8, 20: 1.6},
    2: {10: 1.4, 20: 1.2},
    4: {10: 1.0, 20: 1.9},
}


def grid_row(style: str, seed: int, rank: int, factor: float = 1.0) -> Row:
    losses: dict[str, Any] = {str(step): loss * factor for step, loss in LOSSES[rank].items()}
    return {
        "kind": "grid",
        "name": f"rank {rank}",
        "style": style,
        "seed": seed,
        "settings": {"max_rank": rank},
        "loss": losses["20"],
        "losses": losses,
        "whole": {},
        "steps_run": 20,
        "mean_rank": rank,
        "bytes": 100 * rank,
    }


def setting_row(style: str, seed: int, loss: float, name: str = "paper") -> Row:
    return {
        "kind": "setting",
        "name": name,
        "style": style,
        "seed": seed,
        "settings": {},
        "loss": loss,
        "losses": {},
        "whole": {"best step": 2.0, "refit": loss - 0.1},
        "steps_run": 33,
        "mean_rank": 3.0,
        "bytes": 200,
    }


def base_row(style: str, loss: float = 2.0) -> Row:
    return {"kind": "base", "name": "base", "style": style, "seed": 0, "settings": {}, "loss": loss}


def complete(style: str = "one", seed: int = 0, factor: float = 1.0) -> list[Row]:
    return [base_row(style), *(grid_row(style, seed, rank, factor) for rank in LOSSES)]


# --- images ---


def test_training_and_test_images_are_disjoint() -> None:
    concepts = [f"thing {number}" for number in range(30)]
    drawings = [str(number).encode() for number in range(30)]
    training, verdict = images.split_indices(concepts, drawings, 6, 20)
    assert (len(training), len(verdict)) == (6, 20)
    assert not set(training) & set(verdict)


def test_repeated_drawings_and_concepts_are_skipped() -> None:
    training, verdict = images.split_indices(["a", "b", "a", "c", "d"], [b"1", b"1", b"2", b"3", b"4"], 2, 1)
    assert (training, verdict) == ([0, 3], [4])  # b has a's drawing, the third is a again


def test_too_few_drawings_raise_an_error_with_their_number() -> None:
    with pytest.raises(ValueError, match="There are 2 different drawings, but 2 for training and 1"):
        images.split_indices(["a", "b"], [b"1", b"2"], 2, 1)


def test_the_order_depends_on_the_seed_only() -> None:
    concepts = [f"thing {number}" for number in range(20)]
    first = images.in_random_order(concepts, 3)
    assert first == images.in_random_order(concepts[::-1], 3)
    assert first != images.in_random_order(concepts, 4)
    assert sorted(first) == sorted(concepts)


def test_styles_of_the_base_training_are_refused(tmp_path: Path) -> None:
    assert set(images.STYLES) <= set(icons.HELD_OUT_STYLES)
    assert not set(images.STYLES) & set(icons.BASE_STYLES)
    with pytest.raises(KeyError, match="was trained on 'twemoji'"):
        images.draw_style(tmp_path, "twemoji", 1, 1, 0)


def test_a_style_has_images_and_captions_of_known_concepts(tmp_path: Path) -> None:
    names = ["apple", "boat", "cactus", "dragon", "unheard-of"]
    bodies = {name: {"body": BLACK_SQUARE.replace("8v", f"{place + 2}v")} for place, name in enumerate(names)}
    pack(tmp_path, icons.REFERENCE, names[:4])
    pack(tmp_path, "openmoji", names, **bodies)
    style = images.draw_style(tmp_path, "openmoji", 1, 3, 0)
    assert sorted(style.training.captions + style.verdict.captions) == ["a boat", "a cactus", "a dragon", "an apple"]
    assert style.verdict.images.shape == (3, 128, 128, 3)


def test_the_file_is_read_back_unchanged(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    styles = {
        name: images.Style(images.Part(values[:2], ["a fish", "a pâté"]), images.Part(values[2:], list("abc")))
        for name in ("second", "first")
    }
    path = tmp_path / "folder" / "images.zip"
    images.write(path, styles)
    found = images.read(path)
    assert list(found) == ["second", "first"]
    assert found["first"].training.captions == ["a fish", "a pâté"]
    np.testing.assert_array_equal(found["first"].verdict.images, values[2:])
    assert images.digest(found) == images.digest(styles)
    values[4, 0, 0, 0] ^= 1
    assert images.digest(found) != images.digest(styles)


# --- jobs ---


def test_the_last_step_is_always_a_mark() -> None:
    assert marks_up_to((13, 25, 38), 25) == (13, 25)
    assert marks_up_to((13, 25, 38), 30) == (13, 25, 30)


def test_jobs_are_ordered_by_seed_after_the_base() -> None:
    jobs = ordered(["one", "two"], [5, 6], [1, 2], {"paper": {"mode": "paper"}}, {"alpha": 4.0}, (3, 9))
    assert [job.kind for job in jobs[:2]] == ["base", "base"]
    assert [job.seed for job in jobs[2:]] == [5] * 6 + [6] * 6
    assert [job.name for job in jobs[2:8]] == ["rank 2", "rank 2", "rank 1", "rank 1", "paper", "paper"]
    assert jobs[-1].settings == {"alpha": 4.0, "mode": "paper", "seed": 6}
    assert jobs[2].settings == {
        "alpha": 4.0,
        "mode": "off",
        "held_out": 0.0,
        "stop_early": False,
        "smallest": False,
        "max_rank": 2,
        "steps": 9,
        "seed": 5,
    }


def test_training_accepts_every_setting() -> None:
    assert {setting["mode"] for setting in no_search.SETTINGS.values()} == {"paper", "product", "product_redraw", "off"}
    for setting in no_search.SETTINGS.values():
        TrainConfig(**no_search.DEFAULTS_0_3 | setting)


def test_options_select_jobs() -> None:
    words = ["--styles", "one", "--seeds", "4", "--ranks", "--steps", "7"]
    args = no_search.parse_options([*words, "--settings", "paper, *", "off, rank 16"])
    jobs = no_search.planned_jobs(args, ["one", "two"], {})
    names = {job.name for job in jobs}
    assert {"paper, rank 16", "off, rank 16"} < names and "product, rank 16" not in names
    assert {job.style for job in jobs} == {"one"} and {job.kind for job in jobs} == {"base", "setting"}
    assert all(job.settings["steps"] == 7 for job in jobs if job.kind == "setting")
    args.settings = ["no such"]
    with pytest.raises(SystemExit, match="No setting is called 'no such'"):
        no_search.planned_jobs(args, ["one", "two"], {})


def test_processes_are_distributed_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(3, 1) == [None] * 3
    assert gpus(3, 2) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert gpus(3, 2) == ["4", "6", "4"]


# --- processes ---


def answer(deadline: float, waiting: deque[Job], said: Row | None) -> tuple[list[Row], Any]:
    """Return the rows after one message, or after the end of a process, and the answer to the process."""
    ours, theirs = multiprocessing.Pipe()
    running: dict[Any, Job | None] = {ours: Job("setting", "paper", "one", 1, {})}
    rows: list[Row] = []
    if said is None:
        theirs.close()
    else:
        theirs.send(said)
    pool._answer(ours, running, waiting, rows.append, rows.append, deadline)
    told = None if said is None else theirs.recv()
    theirs.close()
    ours.close()
    return rows, told


def test_a_dead_process_loses_only_its_own_job() -> None:
    waiting = deque([Job("base", "base", "one", 0, {})])
    rows, _ = answer(math.inf, waiting, None)
    assert rows[0]["name"] == "paper" and "ended before the job did" in rows[0]["error"]
    assert len(waiting) == 1


def test_no_job_starts_after_the_deadline() -> None:
    job = Job("base", "base", "one", 0, {})
    assert answer(math.inf, deque([job]), {"loss": 1.0}) == ([{"loss": 1.0}], job)
    waiting = deque([job])
    assert answer(time.monotonic() - 1, waiting, {"loss": 1.0}) == ([{"loss": 1.0}], None)
    assert len(waiting) == 1


def test_non_finite_numbers_become_none() -> None:
    assert finite({"a": [1.0, math.nan], "b": math.inf, "c": "text"}) == {"a": [1.0, None], "b": None, "c": "text"}


def test_results_are_written_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "results" / "out.json"
    run = no_search.Run({"data": "x", "common": {}}, path, 2)
    for row in (base_row("one"), {**setting_row("one", 0, 1.0), "loss": None}):
        run.add(row)
        found = json.loads(path.read_text())
        assert found == {"data": "x", "common": {}, "rows": run.rows}
    assert len(run.rows) == 2


# --- arithmetic ---


def test_the_best_and_the_median_of_the_grid() -> None:
    results = Results(complete())
    best = results.best()["one", 0]
    assert (best.loss, best.rank, best.steps, best.size) == (0.5, 4, 10, 400)
    # At their best steps the ranks lose 0.8, 0.6 and 0.5 of the base; after the last one 0.8, 0.6 and 0.95.
    middle, last = results.median_rank()["one", 0], results.median_rank_last()["one", 0]
    assert (middle.loss, middle.rank, middle.steps) == (0.6, 2, 20)
    assert (last.loss, last.rank, last.steps) == (0.8, 1, 20)


def test_the_median_of_an_even_number_of_ranks_is_the_better_middle_one() -> None:
    results = Results(row for row in complete() if row["settings"].get("max_rank") != 1)
    assert results.median_rank()["one", 0].rank == 4


def test_the_best_rank_and_step_for_all_may_be_best_for_none() -> None:
    rows = complete("one") + complete("two")
    for row in rows[-3:]:
        row["losses"] = {"10": row["losses"]["20"], "20": row["losses"]["10"]}
    results = Results(rows)
    assert results.best_for_all() == (2, 10)  # (1.4 + 1.2) / 2 is below (1.0 + 1.9) / 2
    assert results.grid_mean(2, 10) == pytest.approx(0.65)


def test_a_setting_is_compared_pair_by_pair() -> None:
    rows = complete("one", 0) + complete("two", 0, factor=0.5)
    rows += [setting_row("one", 0, 1.1), setting_row("two", 0, 0.5)]
    line = Results(rows).lines()[-1]
    assert (line.name, line.runs) == ("paper", 2)
    assert line.loss == pytest.approx((0.55 + 0.25) / 2)
    assert line.to_best == pytest.approx((1.1 + 1.0) / 2)
    assert line.to_median == pytest.approx((1.1 / 1.2 + 0.5 / 0.6) / 2)
    assert line.to_median_last == pytest.approx((1.1 / 1.6 + 0.5 / 0.8) / 2)
    assert line.size_to_best == pytest.approx(0.5)
    assert line.before_truncation == pytest.approx((1.0 + 0.4) / 4)
    assert math.isnan(line.spread)


def test_settings_are_sorted_best_first() -> None:
    rows = [*complete(), setting_row("one", 0, 1.5, "worse"), setting_row("one", 0, 1.0, "better")]
    assert [line.name for line in Results(rows).lines()][-2:] == ["better", "worse"]


def test_spread_uses_seeds_with_all_styles_only() -> None:
    losses = {("one", 0): 1.0, ("two", 0): 3.0, ("one", 1): 2.0, ("two", 1): 4.0, ("one", 2): 9.0}
    assert spread_over_seeds(losses) == pytest.approx(math.sqrt(0.5))  # of 2.0 and 3.0


def test_seeds_with_an_incomplete_grid_are_skipped() -> None:
    rows = [*complete(), grid_row("one", 1, 4), setting_row("one", 0, 1.0), setting_row("one", 1, 0.1)]
    line = Results(rows).lines()[-1]
    assert (line.runs, line.loss) == (1, 0.5)


def test_a_failed_job_is_listed_and_a_later_run_replaces_it() -> None:
    failed = {"kind": "setting", "name": "paper", "style": "one", "seed": 0, "settings": {}, "error": "out of memory"}
    assert "paper, one, seed 0: out of memory" in tables.report(Results([*complete(), failed]))
    again = Results([*complete(), failed, setting_row("one", 0, 1.0)])
    assert not again.errors and "paper" in again.settings


def test_a_non_finite_loss_is_never_the_best() -> None:
    rows = complete()
    rows[-1]["losses"]["10"] = rows[-2]["loss"] = None  # rank 4 at step 10; rank 2 after the last, unused
    assert Results(rows).best()["one", 0].rank == 2


def test_only_runs_on_the_same_images_and_options_are_joined() -> None:
    first = {"data": "x", "common": {}, "rows": complete("one")}
    second = {"data": "x", "common": {}, "rows": complete("two")}
    assert len(Results(join([first, second])["rows"]).grid) == 2
    with pytest.raises(ValueError, match="differ in 'data'"):
        join([first, {**second, "data": "y"}])
    with pytest.raises(ValueError, match="differ in 'common'"):
        join([first, {**second, "common": {"alpha": 4.0}}])


def test_the_report_says_which_aims_are_met() -> None:
    text = tables.report(Results([*complete(), setting_row("one", 0, 1.01)]))
    assert "+1.0% from the grid's best; aim: at most +2%: met" in text
    assert "15.8% ahead of the median rank at its best step" in text and "aim: 9%: met" in text
    assert "0.50 times the one of the grid's best; aim: smaller: met" in text
    worse = tables.report(Results([*complete(), {**setting_row("one", 0, 1.3), "bytes": 401}]))
    assert worse.count("not met") == 3


def test_the_report_says_when_the_grid_is_missing() -> None:
    assert "No style and seed has the whole grid" in tables.report(Results([base_row("one")]))
