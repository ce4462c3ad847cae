"""The rank report: its tables, and its round trip through JSON."""

import json
import math
from dataclasses import replace

import pytest

from aclora_core.adapter.rank_report import RankReport, Restart, fit_share
from aclora_core.adapter.training_facts import TrainingFacts
from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss
from aclora_core.inspection.tables import trajectory_table
from aclora_core.method.restart import LayerRank
from aclora_core.text import text_table

TRUNCATIONS = [
    TruncationLoss(Truncation.from_name("rank 4"), 4.0, 750_000, 0.4525, 0.0035, True),
    TruncationLoss(Truncation.from_name("energy 95%"), 6.25, 1_210_000, 0.451, 0.002, False),
    TruncationLoss(Truncation.from_name("whole"), 16.0, 3_000_000, 0.4495, 0.0, False),
]
NAMES = ["diffusion_model.joint_blocks.0.x_block.attn.qkv", "diffusion_model.x_embedder.proj"]


def restart(step, kept=5, names=NAMES, threshold=0.7):
    layers = {name: LayerRank(kept, kept + 1, kept - place, 0.9, 0.25 + place / 10) for place, name in enumerate(names)}
    return Restart(step, step // 4, 0.31, threshold, layers)


def report(**changes):
    made = RankReport(
        settings={"steps": 120, "learning_rate": 5e-4, "mode": "paper", "clear_moments": True},
        losses=[1.0 / (step + 1) for step in range(120)],
        validation=[(40, 0.5), (80, 0.25)],
        restarts=[restart(40), restart(80, 3)],
        spectrum={name: [1.0 / 3.0, 1e-7, 0.0] for name in NAMES},
        signal=dict.fromkeys(NAMES, 2),
        facts=TrainingFacts(images=12, best_step=80, seconds_run=61.25, notes="The disk was full."),
    )
    return replace(made, **changes)


def large_report(layers=800, restarts=100, steps=20_000):
    names = [f"diffusion_model.input_blocks.{place}.1.transformer_blocks.9.attn1.to_out.0" for place in range(layers)]
    spectrum = {name: [1.0 / 3.0] * 64 for name in names}
    rows = [restart(step, 40, names, 1 / 3) for step in range(0, 10 * restarts, 10)]
    rows = [replace(row, layers=dict.fromkeys(names, LayerRank(64, 63, 62, 0.987654321, 0.123456789))) for row in rows]
    return RankReport({}, [1.0 / 3.0] * steps, [(step, 1 / 3) for step in range(2000)], rows, spectrum, {})


def test_json_brings_everything_back():
    assert RankReport.from_json(report().to_json()) == report()


@pytest.mark.parametrize("form", ["to_json", "compact_json"])
def test_the_fit_comes_back(form):
    fit = [(0, 0.625), (80, 0.5), (160, 0.25)]
    assert RankReport.from_json(getattr(report(fit=fit), form)()).fit == fit


def test_a_long_fit_keeps_its_ends_in_the_compact_form():
    fit = [(80 * place, 1 / (1 + place)) for place in range(3000)]
    back = RankReport.from_json(report(fit=fit).compact_json()).fit
    assert len(back) == 500 and back[0] == (0, 1.0) and back[-1] == (fit[-1][0], pytest.approx(fit[-1][1], rel=1e-3))


def test_reports_of_before_have_no_fit():
    old = json.loads(report(fit=[(0, 0.5)]).to_json())
    del old["fit"]
    assert RankReport.from_json(json.dumps(old)) == report(fit=[])


@pytest.mark.parametrize(
    ("fit", "share"),
    [
        ([(0, 0.5), (80, 0.25)], 0.5),
        ([(0, 0.5), (80, 0.1), (160, 0.75)], 1.5),
        ([], None),
        ([(0, 0.5)], None),
        ([(80, 0.5), (160, 0.25)], None),  # what the model has without the adapter is not known
        ([(0, 0.0), (80, 0.0)], None),
        ([(0, math.nan), (80, 0.5)], None),
        ([(0, 0.5), (80, math.nan)], None),
        ([(0, 0.5), (80, math.inf)], None),
    ],
)
def test_the_share_that_is_left_is_that_of_the_last_measurement(fit, share):
    assert fit_share(fit) == share


def test_an_empty_report_comes_back():
    empty = RankReport({}, [], [], [], {}, {})
    assert RankReport.from_json(empty.to_json()) == empty
    assert RankReport.from_json(empty.compact_json()) == empty


def test_files_store_settings_and_facts_in_one_object():
    stored = json.loads(report().to_json())["settings"]
    assert stored == {**report().settings, **report().facts.to_dict()} and stored["best_step"] == 80
    back = RankReport.from_json(report().to_json())
    assert "best_step" not in back.settings and back.facts.best_step == 80


def test_files_store_the_noise_floor_as_null():
    text = report(restarts=[restart(4, threshold="noise floor")]).to_json()
    assert json.loads(text)["restarts"][0]["threshold"] is None


@pytest.mark.parametrize("form", ["to_json", "compact_json"])
def test_the_truncations_come_back(form):
    assert RankReport.from_json(getattr(report(truncations=TRUNCATIONS), form)()).truncations == TRUNCATIONS


@pytest.mark.parametrize("form", ["to_json", "compact_json"])
def test_a_truncation_without_a_loss_comes_back_without_one(form):
    lost = TruncationLoss(Truncation.from_name("rank 1"), 1.0, 187_000, math.inf, math.nan, False)
    text = getattr(report(truncations=[lost, *TRUNCATIONS]), form)()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = RankReport.from_json(text).truncations
    assert back[1:] == TRUNCATIONS and back[0].name == "rank 1" and back[0].size == 187_000
    assert math.isnan(back[0].loss) and math.isnan(back[0].error) and back[0].mean_rank == 1.0


@pytest.mark.parametrize("form", ["to_json", "compact_json"])
def test_a_report_from_before_there_were_truncations_is_read(form):
    data = json.loads(getattr(report(spectrum={}, losses=[0.5, 0.25]), form)())
    del data["cuts"]
    assert RankReport.from_json(json.dumps(data)) == report(spectrum={}, losses=[0.5, 0.25], truncations=[])


def test_nan_and_infinity_stay_out_of_the_json():
    odd = report(losses=[0.5, math.nan, math.inf], restarts=[restart(2, threshold="noise floor")])
    text = odd.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = RankReport.from_json(text)
    assert back.losses[0] == 0.5 and math.isnan(back.losses[1]) and math.isnan(back.losses[2])
    assert back.restarts[0].threshold == "noise floor"


def test_a_layer_that_a_restart_did_not_see_stays_unseen():
    partial = report(restarts=[restart(40), restart(80, names=NAMES[1:])])
    back = RankReport.from_json(partial.to_json())
    assert back == partial and NAMES[0] not in back.restarts[1].layers


def test_the_compact_form_of_a_small_report_lacks_only_the_spectra():
    exact = report(losses=[0.5, 0.25], spectrum={name: [1.0] for name in NAMES})
    assert RankReport.from_json(exact.compact_json()) == replace(exact, spectrum={})


def test_the_compact_form_of_800_layers_and_a_long_training_fits_into_a_file_header():
    text = large_report().compact_json()
    assert len(text.encode()) < 500_000
    assert json.loads(text)["spectrum"] == {}


def test_the_compact_form_thins_evenly_and_keeps_the_first_and_the_last_restart():
    large = large_report(steps=10_001)
    falling = replace(large, losses=[1.0 - step / 10_001 for step in range(10_001)])
    back = RankReport.from_json(falling.compact_json())
    steps = [row.step for row in back.restarts]
    assert steps[0] == 0 and steps[-1] == 990 and 20 <= len(steps) <= 25
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 50
    assert len(back.losses) == 10_001
    assert max(abs(a - b) for a, b in zip(back.losses, falling.losses, strict=True)) < 0.0025


def test_layer_names_come_from_all_parts_of_the_report():
    parts = report(spectrum={"a": [1.0]}, signal={"b": 1}, restarts=[restart(1, names=["c", "a"])])
    assert parts.layer_names() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "as it is not JSON"),
        ("{", "as it is not JSON"),
        ("[" * 100_000, "as it is not JSON"),
        ("[]", "its format is 'list'"),
        ("{}", "its format is 'none'"),
        ('{"format": "workflow"}', "its format is 'workflow'"),
        ('{"format": "aclora rank report 1"}', "damaged: 'layers' is missing"),
    ],
)
def test_other_text_than_a_report_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(ValueError, match="AC-LoRA rank report") as caught:
        RankReport.from_json(text)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 10**12),
        ("steps", 3),
        ("losses", ["low"]),
        ("losses", 7),
        ("signal", [1]),
        ("settings", []),
        ("settings", {"best_step": "soon"}),
        ("settings", {"cancelled": "at noon"}),
        ("validation", [1]),
        ("restarts", [{"step": 1}]),
        ("layers", None),
        ("spectrum", {"a": 1}),
        ("cuts", None),
        ("cuts", ["rank 4"]),
        ("cuts", [{"name": "rank 4"}]),
        ("cuts", [{"name": "rank 4", "mean_rank": 4, "size": -1, "loss": 1, "error": 0, "chosen": True}]),
        ("cuts", [{"name": "rank 4", "mean_rank": 4, "size": 10**400, "loss": 1, "error": 0, "chosen": True}]),
        ("cuts", [{"name": "rank 4", "mean_rank": "low", "size": 1, "loss": 1, "error": 0, "chosen": True}]),
    ],
)
def test_a_damaged_report_is_refused(key, value):
    data = json.loads(report().to_json())
    with pytest.raises(ValueError, match="is damaged"):
        RankReport.from_json(json.dumps({**data, key: value}))


def test_a_restart_with_fewer_ranks_than_layers_is_damage():
    data = json.loads(report().to_json())
    data["restarts"][0]["kept_up"].pop()
    with pytest.raises(ValueError, match="is damaged"):
        RankReport.from_json(json.dumps(data))


def test_the_trajectory_table_has_mean_and_range_for_each_restart():
    lines = trajectory_table(report()).splitlines()
    assert len(lines) == 3
    assert "4.5 (4 to 5)" in lines[1] and "5.0 (5 to 5)" in lines[1] and "0.700" in lines[1] and "90.0%" in lines[1]
    assert "2.5 (2 to 3)" in lines[2]


@pytest.mark.parametrize("form", ["to_json", "compact_json"])
def test_a_report_from_before_jumps_were_measured_is_read(form):
    data = json.loads(getattr(report(spectrum={}, losses=[0.5, 0.25]), form)())
    for row in data["restarts"]:
        del row["jump"]
    back = RankReport.from_json(json.dumps(data))
    ranks = back.restarts[0].layers
    assert all(math.isnan(rank.jump) for rank in ranks.values()) and back.restarts[0].mean_jump() is None
    assert {name: replace(rank, jump=0.0) for name, rank in ranks.items()} == {
        name: replace(rank, jump=0.0) for name, rank in restart(40).layers.items()
    }
    assert trajectory_table(back).splitlines()[1].endswith("90.0%              -")


def test_the_jump_is_the_mean_of_the_layers_in_which_it_was_measured():
    assert restart(40).mean_jump() == pytest.approx(0.3)
    partly = restart(40).layers | {"old": LayerRank(1, 1, 1, 1.0)}
    assert replace(restart(40), layers=partly).mean_jump() == pytest.approx(0.3)
    lines = trajectory_table(report()).splitlines()
    assert lines[0].endswith("jump of delta") and lines[1].endswith("30.0%")


def test_the_trajectory_table_names_the_noise_floor_and_a_training_without_restarts():
    assert "noise floor" in trajectory_table(report(restarts=[restart(4, threshold="noise floor")]))
    assert trajectory_table(report(restarts=[])) == "No restart: the training was shorter than two restart intervals."
    off = report(restarts=[], settings={"mode": "off"})
    assert trajectory_table(off) == "No restart: restarts were off."


def test_columns_of_a_table_line_up():
    lines = text_table(["layer", "rank"], [["a", "1"], ["longer name", "128"]]).splitlines()
    assert lines == ["layer        rank", "a               1", "longer name   128"]


def test_the_tags_are_in_the_whole_report_and_not_in_the_compact_one():
    report = RankReport({}, [0.5], [], [], {}, {}, tags={"ink": 3})
    assert RankReport.from_json(report.to_json()).tags == {"ink": 3}
    assert RankReport.from_json(report.compact_json()).tags == {}
