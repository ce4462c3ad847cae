"""bench.eight_styles: scores by hand, the verdict, the rules for the stop, and joined result files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.eight_styles import stop_rules, tables
from bench.eight_styles.result_files import join, read, without_images
from bench.eight_styles.scores import RETURNED, Cell, Scores
from bench.eight_styles.step_chart import COLOURS, curves, write_chart
from bench.eight_styles.stop_rules import WatchedRun, outcome, stop_table, watched_runs
from bench.eight_styles.verdict import DEFAULT, Verdict, verdict
from bench.pool import Row
from bench.result_file import write
from launcher.environment import ROOT

REFERENCE = Cell("rank 16", "640")


def measures(style: float = 0.5, concept: float = 0.8, **others: Any) -> dict[str, Any]:
    """Return a cell; without arguments that of the reference."""
    found = {
        "style": style,
        "concept_in_five": concept,
        "likeness_icons": 0.7,
        "likeness_photos": 0.5,
        "frechet_icons": 40.0,
        "frechet_photos": 30.0,
        "kid_photos": 0.08,
        "copies_share_photos": 0.1,
        "copies_drawn_photos": 0.6,
        "spread_photos": 0.5,
    }
    return {**found, **others}


def row(
    name: str, cells: dict[str, Any], style: str = "one", seed: int = 0, kind: str = "training", **facts: Any
) -> Row:
    return {"kind": kind, "name": name, "style": style, "seed": seed, "settings": {}, "cells": cells, **facts}


def scaled(ratio: float, **others: Any) -> dict[str, Any]:
    """Return a cell whose score is the ratio: all measures are better than the reference's by it."""
    found = measures(0.5 * ratio, 0.8 * ratio, likeness_icons=0.7 * ratio, likeness_photos=0.5 * ratio)
    return {**found, "frechet_icons": 40 / ratio, "frechet_photos": 30 / ratio, **others}


def grid_rows(style: str = "one", factors: tuple[float, ...] = (0.5, 0.8, 1.0, 1.1)) -> list[Row]:
    """Return two ranks at two steps; the scores are the factors, of which rank 16 at 640 steps has the third."""
    a, b, reference, d = map(scaled, factors)
    return [
        row("rank 4", {"320": a, "640": b}, style, bytes=1_000_000, mean_rank=4.0),
        row("rank 16", {"640": reference, "1280": d}, style, bytes=4_000_000, mean_rank=16.0),
    ]


# --- scores ---


def test_the_score_is_the_mean_of_four_ratios_over_both_networks() -> None:
    found = measures(0.6, 0.6, likeness_icons=0.77, likeness_photos=0.45, frechet_icons=50.0, frechet_photos=24.0)
    scores = Scores([row("rank 16", {"640": measures()}), row("other", {"640": found})])
    likeness, distance = (1.1 + 0.9) / 2, (40 / 50 + 30 / 24) / 2
    assert scores.reference == REFERENCE and scores.score(REFERENCE) == pytest.approx(1.0)
    assert scores.score(Cell("other", "640")) == pytest.approx((1.2 + 0.75 + likeness + distance) / 4)


def test_measures_are_averaged_over_seeds_before_the_ratios() -> None:
    seeds = [row("other", {"640": measures(frechet_icons=value)}, seed=seed) for seed, value in enumerate((40.0, 60.0))]
    scores = Scores([row("rank 16", {"640": measures()}), *seeds])
    assert scores.score(Cell("other", "640")) == pytest.approx((3 + (40 / 50 + 1) / 2) / 4)
    assert scores.runs(Cell("other", "640")) == 2
    deviation = abs(1 - (3 + (40 / 60 + 1) / 2) / 4) / math.sqrt(2)
    assert scores.spread_over_seeds(Cell("other", "640")) == pytest.approx(deviation)
    assert math.isnan(scores.spread_over_seeds(REFERENCE))


def test_styles_count_the_same_whatever_their_level() -> None:
    rows = [
        row("rank 16", {"640": measures(0.8)}, "one"),
        row("rank 16", {"640": measures(0.1)}, "two"),
        row("other", {"640": measures(0.8)}, "one"),
        row("other", {"640": measures(0.2)}, "two"),
    ]
    assert Scores(rows).score(Cell("other", "640")) == pytest.approx((1 + (3 + 2) / 4) / 2)


def test_a_reference_that_hardly_draws_the_style_does_not_outweigh_the_rest() -> None:
    rows = [row("rank 16", {"640": measures(0.0)}), row("other", {"640": measures(0.02)})]
    assert Scores(rows).score(Cell("other", "640")) == pytest.approx((3 + 2) / 4)


def test_planted_cases_have_the_order_that_they_must() -> None:
    far = {"frechet_icons": 90.0, "frechet_photos": 80.0, "likeness_icons": 0.4, "likeness_photos": 0.2}
    near = {"frechet_icons": 1.0, "frechet_photos": 3.0, "likeness_icons": 0.99, "likeness_photos": 0.95}
    same = {"frechet_icons": 0.0, "frechet_photos": 0.0, "likeness_icons": 1.0, "likeness_photos": 1.0}
    rows = [
        row("noise", {"": measures(0.08, 0.02, **far)}),
        row("the base", {"": measures(0.01, 1.0, frechet_icons=60.0)}, kind="base"),
        row("half a style", {"640": measures(0.3, 0.8)}),
        row("rank 16", {"640": measures()}),
        row("better", {"640": measures(0.6, 0.85)}),
        row("through the autoencoder", {"": measures(0.98, 1.0, **near)}, kind="vae"),
        row("real images", {"": measures(0.99, 1.0, **same)}, kind="real"),
    ]
    scores = Scores(rows[::-1])
    assert [cell.name for cell in sorted(scores.cells, key=scores.score)] == [row["name"] for row in rows]


def test_without_rank_16_a_plain_line_is_the_reference_and_any_other_can_be_named() -> None:
    rows = [row("plain, cut", {"640": measures()}), row("other", {"320": measures(0.25)})]
    assert Scores(rows).reference == Cell("plain, cut", "640")
    assert Scores(rows, Cell("other", "320")).score(Cell("plain, cut", "640")) == pytest.approx((3 + 2) / 4)
    with pytest.raises(ValueError, match=r"not measured: rank 3, 640 steps.*plain, cut; other"):
        Scores(rows, Cell("rank 3", "640"))


def test_failed_jobs_and_cells_without_all_styles_are_listed_but_not_in_the_tables() -> None:
    failed = {**row("broken", {}), "error": "out of memory"}
    rows = [*grid_rows("one"), *grid_rows("two"), row("half", {"640": measures()}), failed]
    rows.append(row("blank", {"640": measures(frechet_icons=None)}))
    scores = Scores(rows)
    assert not {"half", "blank", "broken"} & {cell.name for cell in scores.cells}
    text = tables.report(scores, {})
    assert "broken, one, seed 0: out of memory" in text and "half, 640 steps: measured in 1 of 2 styles" in text


def test_sizes_belong_to_the_adapter_that_was_returned() -> None:
    cells = {"640": measures(), RETURNED: measures(), "energy 0.9": {**measures(), "bytes": 10}}
    rows = [row("rank 16", {"640": measures()}, bytes=30), row("default", cells, bytes=20)]
    scores = Scores(rows)
    assert scores.mean(REFERENCE)["bytes"] == 30
    assert scores.mean(Cell("default", RETURNED))["bytes"] == 20
    assert scores.mean(Cell("default", "energy 0.9"))["bytes"] == 10
    assert "bytes" not in scores.mean(Cell("default", "640"))


# --- verdict and tables ---


def default_row(style: str, ratio: float, **others: Any) -> Row:
    return row(DEFAULT.name, {RETURNED: scaled(ratio, **others)}, style, bytes=1_000_000)


def two_styles(*more: Row) -> Scores:
    """Return a grid in two styles whose best cells differ: rank 16 after 1,280 steps, and rank 4 after 640."""
    return Scores([*grid_rows("one"), *grid_rows("two", (0.5, 1.25, 1.0, 1.2)), *more])


def judged(scores: Scores, candidate: Cell = DEFAULT) -> Verdict:
    found = verdict(scores, candidate)
    assert found is not None
    return found


def test_the_verdict_finds_best_median_and_each_styles_own_best() -> None:
    found = judged(two_styles())
    assert found.candidate is None and found.best_library is None
    assert found.best == Cell("rank 16", "1280")  # 1.15, 1.025, 1 and 0.5 on average
    assert found.median == Cell("rank 4", "640")
    assert found.best_of_style == {"one": Cell("rank 16", "1280"), "two": Cell("rank 4", "640")}
    assert found.score_of_best == pytest.approx((1.1 + 1.25) / 2)


def test_regrets_of_the_default_are_those_by_hand() -> None:
    found = judged(two_styles(default_row("one", 1.1), default_row("two", 1.2)))
    assert found.candidate == DEFAULT
    assert found.ratio(DEFAULT, found.best) == pytest.approx(1.0)
    assert found.regrets(DEFAULT) == pytest.approx({"one": 0.0, "two": 1 - 1.2 / 1.25})


def test_the_report_says_which_aims_are_met() -> None:
    library = [row("DoRA", {"640": scaled(1.2)}, style, kind="library") for style in ("one", "two")]
    better = {"copies_share_photos": 0.05, "copies_drawn_photos": 0.5}
    good = two_styles(*library, default_row("one", 1.21, **better), default_row("two", 1.25, **better))
    text = "\n".join(tables.verdict_lines(judged(good)))
    assert "best cell: 1.070 times its score; aim: 1: met" in text
    assert "own best cell: 5.0% ahead on average" in text and "the worst style, two: 0.0% behind" in text
    assert "median cell: 1.200 times its score; aim: 1.09: met" in text
    assert "best library: 1.025 times its score; aim: above 1: met" in text
    assert "share of copies: -0.050 to the best cell's" in text and "file: 0.25 times the best cell's" in text
    assert "not met" not in text
    worse = {"copies_share_photos": 0.2, "copies_drawn_photos": 0.7, "bytes": 3_000_000}
    bad = two_styles(*library, default_row("one", 0.9, **worse), default_row("two", 0.9, **worse))
    text = "\n".join(tables.verdict_lines(judged(bad)))
    assert text.count(": not met") == text.count("aim:") == 9


def test_any_cell_can_be_compared_with_the_grid() -> None:
    found = judged(two_styles(), Cell("rank 4", "640"))
    assert found.candidate == Cell("rank 4", "640")
    assert found.regrets(Cell("rank 4", "640")) == pytest.approx({"one": 1 - 0.8 / 1.1, "two": 0.0})


def test_the_table_has_base_real_grid_libraries_methods_and_default_in_this_order() -> None:
    others = [
        default_row("one", 1.0),
        row("restarts", {"640": measures()}),
        row("DoRA", {"640": measures()}, kind="library"),
        *grid_rows()[::-1],
        row("real images", {"": measures()}, kind="real"),
        row("the base", {"": measures()}, kind="base"),
    ]
    lines = tables.cell_table(Scores(others), {"device": "a card", "date": "today"}).splitlines()
    assert lines[0] == "1 style (a card, today)."
    assert [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")][2:] == [
        "the base",
        "real images",
        "rank 4, 320 steps",
        "rank 4, 640 steps",
        "rank 16, 640 steps",
        "rank 16, 1280 steps",
        "DoRA, 640 steps",
        "restarts, 640 steps",
        "the default",
    ]
    assert "| rank 4, 320 steps | 1 | 0.500 |  | 0.250 | 0.400 |" in "\n".join(lines)
    other = tables.cell_table(Scores(others), {}, Cell("restarts", "640"))
    assert other.splitlines()[-1].startswith("| restarts, 640 steps |")


def test_styles_are_listed_one_by_one_with_what_the_default_misses() -> None:
    scores = two_styles(default_row("one", 1.1), default_row("two", 1.2))
    text = tables.style_table(scores, verdict(scores))
    assert text.endswith("| rank 4, 640 steps | 1.250 / 0.625 / 1.000 | 4.0% behind |")


def test_without_a_grid_there_are_tables_but_no_verdict() -> None:
    scores = Scores([row("plain", {"640": measures()}), row("other", {"640": scaled(1.1)})])
    text = tables.report(scores, {})
    assert verdict(scores) is None and "so there is no verdict" in text and "best cell (other, 640 steps)" in text


# --- rules for the stop ---

LOSSES = {0: 1.0, 80: 0.5, 160: 0.3, 320: 0.2, 640: 0.1}


def run(scores: tuple[float, ...] = (0.4, 0.8, 1.0, 0.9), **values: tuple[float, ...]) -> WatchedRun:
    """Return a training with marks at 80, 160, 320 and 640 steps and values of other measures there."""
    steps = list(LOSSES)[1:]
    seen = {step: {"training_loss": loss} for step, loss in LOSSES.items()}
    for name, numbers in values.items():
        for step, number in zip(steps, numbers, strict=True):
            seen[step][name] = number
    return WatchedRun(dict(zip(steps, scores, strict=True)), seen)


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (stop_rules.after(300), 320),
        (stop_rules.below("training_loss", 0.4), 160),
        (stop_rules.below("training_loss", 0.4, least=300), 320),
        (stop_rules.below("training_loss", 0.01), 640),
        (stop_rules.below_share("training_loss", 0.25), 320),
        (stop_rules.at_extremum(lambda seen: -seen["training_loss"]), 640),
        (stop_rules.plateau(lambda seen: -seen["training_loss"], 0.15, patience=2), 640),
        (stop_rules.plateau(lambda seen: -seen["training_loss"], 0.35, patience=2), 320),
    ],
)
def test_a_rule_stops_where_it_should(rule: stop_rules.Rule, step: int) -> None:
    assert rule(run()) == step


def test_dvar_stops_when_the_last_losses_hardly_vary() -> None:
    seen = {0: {"loss": 1.0}, **{step: {"loss": 0.1} for step in (1, 2, 3, 4)}}
    flat = WatchedRun(dict.fromkeys((1, 2, 3, 4), 1.0), seen)
    assert stop_rules.dvar("loss", 0.1, window=2)(flat) == 2  # variance 0 of the last two, 0.18 of all
    assert stop_rules.dvar("training_loss", 1e-4)(run()) == 640  # it never gets so small


def test_extrema_take_the_sign_that_is_better() -> None:
    watched = run(gained_middle=(1, 2, 4, 3), kept_middle=(9, 8, 1, 0), held_out_loss=(3, 1, 2, 4))
    rules = stop_rules.rules([100, 300])
    assert (rules["100 steps"](watched), rules["300 steps"](watched)) == (80, 320)
    assert rules["held-out loss, minimum"](watched) == 160
    assert rules["gained (middle), maximum"](watched) == 320
    assert rules["gained + 2 · kept (middle), maximum"](watched) == 80
    distance = run(style_distance_late=(5, 2, 3, 4))
    assert rules["style distance (late), minimum"](distance) == 160
    assert rules["style distance (late), plateau 0"](distance) == 640


def test_regret_is_measured_against_the_best_mark_of_the_same_training() -> None:
    found = outcome(stop_rules.after(160), [run(), run((0.5, 0.5, 0.5, 0.5))])
    assert (found.mean, found.worst, found.steps) == pytest.approx((0.1, 0.2, 160))


def stop_values(step: int) -> dict[str, float]:
    keys = ("gained", "centred", "kept", "style_distance")
    values = {f"{key}_{block}": step / 100 for key in keys for block in stop_rules.BLOCKS}
    return {**values, "held_out_loss": 1 + step / 1000, "training_loss": 1 / (1 + step)}


def watched_row(name: str, style: str) -> Row:
    cells = {"80": scaled(0.5), "640": scaled(1.0), "1600": scaled(0.9), "strength 0.8": scaled(2.0)}
    return row(name, cells, style, stop={str(step): stop_values(step) for step in (0, 80, 640, 1600)})


def test_watched_trainings_are_grouped_by_line_and_rules_ranked_by_regret() -> None:
    rows = [*grid_rows(), watched_row("16 images", "one"), watched_row("8 images", "one")]
    rows.append({**watched_row("8 images", "one"), "seed": 1})
    scores = Scores(rows)
    groups = watched_runs(scores)
    assert {name: len(runs) for name, runs in groups.items()} == {"16 images": 1, "8 images": 2}
    assert groups["8 images"][0].steps == [80, 640, 1600]
    lines = [line for line in stop_table(scores).splitlines() if line.startswith("| ")]
    assert lines[0] == "|  | all lines | 16 images (1) | 8 images (2) |"
    best = lines.index("| 640 steps | 0.0% | 0.0%, 0.0%, 640 | 0.0%, 0.0%, 640 |")
    assert best < lines.index("| held-out loss, minimum | 50.0% | 50.0%, 50.0%, 80 | 50.0%, 50.0%, 80 |")
    assert "No training was watched" in stop_table(Scores(grid_rows()))


def test_marks_where_something_is_not_finite_are_left_out() -> None:
    broken = watched_row("watched", "one")
    broken["stop"]["80"]["training_loss"] = None
    broken["cells"]["640"]["frechet_photos"] = None
    assert watched_runs(Scores([*grid_rows(), broken]))["watched"][0].steps == [1600]
    broken["cells"]["1600"]["style"] = None
    assert watched_runs(Scores([*grid_rows(), broken])) == {}


# --- result files ---


def results(rows: list[Row], **facts: Any) -> dict[str, Any]:
    return {"data": "x", "date": "today", **facts, "rows": rows}


def test_of_rows_with_the_same_name_style_seed_and_steps_the_later_one_counts() -> None:
    failed = {**row("a", {}), "error": "no memory"}
    again = [row("a", {"": measures()}), row("a", {}, seed=1), row("a", {}, style="two")]
    found = join([results([failed, row("b", {})]), results(again, date="tomorrow", device="card")])
    assert [(row["name"], row["style"], row["seed"]) for row in found["rows"]] == [
        ("b", "one", 0),
        ("a", "one", 0),
        ("a", "one", 1),
        ("a", "two", 0),
    ]
    assert not any("error" in row for row in found["rows"])
    assert (found["data"], found["date"], found["device"]) == ("x", "today, tomorrow", "card")


def test_a_line_may_have_trainings_of_several_lengths() -> None:
    short = {**row("rank 16", {"640": measures(0.1)}), "settings": {"steps": 640}}
    long = {**row("rank 16", {"640": measures(0.3), "2400": measures()}), "settings": {"steps": 2400}}
    again = {**row("rank 16", {"640": measures(0.2)}), "settings": {"steps": 640}}
    scores = Scores(join([results([short, long]), results([again])])["rows"])
    assert set(scores.cells) == {Cell("rank 16", "2400"), REFERENCE}
    assert scores.mean(REFERENCE)["style"] == 0.2


def test_results_of_different_images_are_not_joined() -> None:
    with pytest.raises(ValueError, match="different images"):
        join([results([]), results([], data="y")])


def test_a_file_that_is_no_result_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json is no result file"):
        read([path])


def test_the_small_file_has_no_images_and_gives_the_same_tables(tmp_path: Path) -> None:
    rows = [{**row("rank 16", {"640": {**measures(1 / 3), "images": "strip"}}), "images": 8}]
    small = without_images(results(rows))
    write(tmp_path / "small.json", small)
    assert "strip" not in (tmp_path / "small.json").read_text(encoding="utf-8")
    assert small["rows"][0]["images"] == 8 and small["rows"][0]["cells"]["640"]["style"] == 0.33333
    assert "images" in rows[0]["cells"]["640"]
    again = read([tmp_path / "small.json"])
    assert tables.report(Scores(again["rows"]), again) == tables.report(Scores(rows), results(rows))


def test_the_command_line_prints_tables_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "a.json", results([*grid_rows(), default_row("one", 1.2)]))
    write(tmp_path / "b.json", results([], data="y"))

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bench.eight_styles", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    found = call("--table", str(tmp_path / "a.json"))
    assert found.returncode == 0 and "| the default | 1 | 1.200 |" in found.stdout
    refused = call("--table", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert refused.returncode == 1 and refused.stderr.startswith("The results are of different images")
    assert not refused.stdout
    small = tmp_path / "small.json"
    assert call("--without-images", str(small), str(tmp_path / "a.json")).returncode == 0
    assert len(json.loads(small.read_text(encoding="utf-8"))["rows"]) == 3


# --- chart over steps ---


def test_the_chart_shows_lines_that_have_several_steps(tmp_path: Path) -> None:
    scores = Scores([*grid_rows(), row("one step", {"640": measures()})])
    assert {name: [step for step, _ in points] for name, points in curves(scores).items()} == {
        "rank 4": [320, 640],
        "rank 16": [640, 1280],
    }
    with pytest.raises(ValueError, match="'one step' was not drawn at two steps or more"):
        curves(scores, ["one step"])
    write_chart(scores, tmp_path / "chart.svg")
    write_chart(scores, tmp_path / "chart.png", ["rank 4"])
    assert "<svg" in (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_chart_has_no_more_lines_than_colours() -> None:
    rows = [row(f"line {number}", {"320": measures(), "640": measures()}) for number in range(len(COLOURS) + 1)]
    scores = Scores(rows, Cell("line 0", "640"))
    assert len(curves(scores)) == len(COLOURS)
    with pytest.raises(ValueError, match="at most 7 lines, but 8"):
        curves(scores, [row["name"] for row in rows])
