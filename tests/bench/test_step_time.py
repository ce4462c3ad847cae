"""bench.step_time on miniatures: every variant is timed, trainings that differ are found, versions are compared."""

import json
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench.step_time import __main__ as step_time
from bench.step_time import aclora as ours
from bench.step_time import bare_loop as bare
from bench.step_time import check, compare_versions
from bench.step_time import native_node as native
from bench.step_time import profile as step_profile
from bench.step_time.clock import Clock, Measured, TimingComplete, measure
from bench.step_time.models import CASES, IMAGES, build_model, case_named, random_dataset
from bench.step_time.table import Table
from bench.training_session import make_config, training_session
from launcher.environment import ROOT

CPU = torch.device("cpu")
QUICK = ["--tiny", "--batches", "1", "--steps", "2", "--warm-up", "1", "--native-steps", "1", "--rounds", "1"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Train on two images, as each training measures its images too."""
    monkeypatch.setattr(ours, "random_dataset", partial(random_dataset, count=2))


@pytest.fixture
def small(pack):
    return case_named("sd15", miniature=True, memory=0)


def test_every_variant_of_a_miniature_is_timed_and_written(pack, tmp_path, capsys):
    file = tmp_path / "results.json"
    args = step_time.parse_options([*QUICK, "--cases", "sd15", "--out", str(file)])
    step_time.Bench(pack, args, CPU).run()

    results = json.loads(file.read_text())
    assert results["cases"]["sd15"]["flops"] > 0
    assert [row["variant"] for row in results["rows"]] == [*native.MODES, step_time.BARE, *step_time.VARIANTS]
    for row in results["rows"]:
        known = not ours.unknown(pack, step_time.VARIANTS.get(row["variant"], {}))
        assert (row["failure"] == "" and row["median_ms"] > 0 and row["seconds"]["first"] > 0) == known, row
    assert "### SD1.5 in miniature, batch 1" in capsys.readouterr().out


def test_profile_lists_functions_and_kernels(pack, small, capsys):
    step_profile.profile(ours.training(pack, small, 1, {}), CPU, "a miniature")
    printed = capsys.readouterr().out
    assert "### a miniature: first step after" in printed and "training/train.py, train" in printed
    assert "ms of kernels in a step" in printed and "aten::mm" in printed


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_the_bare_loop_runs_on_every_model(pack, name):
    row = Measured(name, 2, "bare", "bare loop")
    measure(row, Clock(CPU, 1, 1), bare.training(case_named(name, miniature=True, memory=0), 2))
    assert not row.failure
    assert len(row.milliseconds) == 1


def test_counted_flops_cover_the_forward_and_backward_pass_of_every_layer(small):
    base = build_model(small).model.diffusion_model
    linear = sum(module.weight.numel() for module in base.modules() if isinstance(module, torch.nn.Linear))
    assert bare.counted_flops(small) > 2 * 2 * linear  # two operations for each weight, in both passes


def test_a_failure_is_a_result(small):
    def broken(clock):
        raise RuntimeError("no such kernel\nand a long trace")

    row = measure(Measured("sd15", 1, "ours", "x"), Clock(CPU, 1, 1), broken)
    assert row.failure == "RuntimeError: no such kernel"
    assert math.isnan(row.median)


def test_a_non_finite_loss_is_a_failure(small):
    def diverging(clock):
        while True:
            clock.tick(math.nan)

    assert "not finite" in measure(Measured("sd15", 1, "ours", "x"), Clock(CPU, 1, 1), diverging).failure


def test_a_slow_row_is_timed_over_fewer_steps():
    clock = Clock(CPU, warm_up=2, steps=1000, max_seconds=0.0)
    with pytest.raises(TimingComplete):
        for _ in range(1000):
            clock.tick()
    assert 1 <= len(clock.milliseconds()) < 10
    assert set(clock.seconds) == {"first", "warm-up"}


def test_rows_are_skipped_after_the_time_limit(pack, monkeypatch):
    monkeypatch.setattr(
        native, "training", lambda *_: lambda clock: pytest.fail("a row was started after the time limit")
    )
    args = step_time.parse_options([*QUICK, "--cases", "sd15", "--seconds", "0", "--variants", "native, defaults"])
    table = step_time.Bench(pack, args, CPU).run()
    assert [row.failure for row in table.rows] == ["skipped: the time limit of 0 seconds is reached"]


def test_ratios_are_taken_against_the_best_native_mode(capsys):
    table = Table({"peak_flops": 1e12}, None)
    table.add_case("sdxl", title="SDXL", flops=5e9)
    for kind, variant, time in (("native", "slow", 300.0), ("native", "fast", 200.0), ("ours", "mine", 50.0)):
        table.add(Measured("sdxl", 2, kind, variant, [time], failure="broke" if variant == "slow" else ""))
    table.print()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| mine"))
    assert [cell.strip() for cell in line.split("|")[1:7]] == ["mine", "50.0", "4.00", "", "", "20.0%"]


def test_no_weight_of_a_random_model_is_all_zero(small):
    """A zero output layer, as in newly initialised models, would zero gradients that a real training computes."""
    base = build_model(small).model.diffusion_model
    assert all(parameter.abs().sum() > 0 for parameter in base.parameters())


def test_flux_is_truncated_to_the_blocks_that_fit():
    whole, half = (case_named("flux", False, gigabytes * 2**30).network for gigabytes in (1000, 60))
    assert (whole["depth"], whole["depth_single_blocks"]) == (19, 38)
    assert 1 < half["depth"] < 19 and half["depth_single_blocks"] > half["depth"]
    assert CASES["flux"].network["depth"] == 19


def test_random_dataset_has_one_caption_per_image_and_two_sizes_on_request():
    latents, captions = random_dataset(case_named("sdxl", True, 0), sizes=2)
    assert len(latents) == len(captions) == IMAGES
    assert len({tuple(latent["samples"].shape) for latent in latents}) == 2


def test_the_check_distinguishes_equal_trainings_from_different_ones(pack, small):
    first, again, other = (ours.trained(pack, small, {"steps": 4, "batch_size": 2, "seed": seed}) for seed in (1, 1, 2))
    assert check.compare(again, first).complaints() == []
    wrong = check.compare(other, first).complaints()
    assert any("losses differ" in sentence for sentence in wrong)
    assert any("ΔW differs" in sentence for sentence in wrong)


def test_a_disagreement_fails_the_check(pack, monkeypatch):
    real = ours.trained
    monkeypatch.setattr(check, "SCENARIOS", check.SCENARIOS[:1])
    monkeypatch.setattr(
        ours,
        "trained",
        lambda pack, case, settings, *rest: real(pack, case, settings | {"seed": int(settings["graph"])}, *rest),
    )
    args = step_time.parse_options(["--check", "--tiny", "--cases", "sd15"])
    assert not check.run(pack, step_time.chosen_cases(args, CPU), steps=3)


def test_worse_gradients_than_without_the_kernels_fail_the_check(pack, small, monkeypatch):
    assert check._gradients(pack, small)
    real = ours.trained

    def wrong(pack, case, settings, *rest):  # as if the kernels had trained with other noise
        of_kernels = case.dtype != torch.float32 and settings[ours.WITHOUT] is None
        return real(pack, case, settings | {"seed": int(of_kernels)}, *rest)

    monkeypatch.setattr(ours, "trained", wrong)
    assert not check._gradients(pack, small)


def test_two_versions_are_compared_in_turns_and_written(tmp_path, monkeypatch, capsys):
    order = []

    def run(checkout, case, batch, args):
        order.append("new" if checkout == ROOT else "old")
        steps = [10.0, 11.0, 12.0] if checkout == ROOT else [20.0, 22.0, 24.0]
        return {"failure": "", "milliseconds": steps, "last_loss": 0.5, "log": ["a message"]}

    monkeypatch.setattr(compare_versions, "_run_process", run)
    file = tmp_path / "versions.json"
    words = ["--against", str(tmp_path), "--cases", "sd15", "--batch", "1", "--rounds", "2", "--out", str(file)]
    (comparison,) = compare_versions.compare_versions(step_time.parse_options(words))

    assert order == ["old", "new", "new", "old"]
    assert comparison.ratio == 0.5
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "| sd15 | 1 | 22.00 (22.00 to 22.00) | 11.00 (11.00 to 11.00) | 0.500 |"
    )
    (written,) = json.loads(file.read_text())["comparisons"]
    assert written["ratio"] == 0.5 and written["old"]["log"] == ["a message"]


def test_a_version_that_fails_has_no_ratio(tmp_path, monkeypatch, capsys):
    failed = {"failure": "RuntimeError: no such kernel"}
    monkeypatch.setattr(compare_versions, "_run_process", lambda *_: failed)
    words = ["--against", str(tmp_path), "--cases", "sd15", "--rounds", "1"]
    (comparison,) = compare_versions.compare_versions(step_time.parse_options(words))
    assert comparison.ratio is None and comparison.new.failures == ["RuntimeError: no such kernel"]
    assert "| sd15 | 1 | failed | failed |  |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkout_is_timed_in_a_process_of_its_own(host):
    words = [*QUICK, "--host", str(host), "--against", str(ROOT), "--cases", "sd15"]
    (comparison,) = compare_versions.compare_versions(step_time.parse_options(words))
    assert comparison.old.failures == comparison.new.failures == []
    assert len(comparison.old.rounds[0]) == len(comparison.new.rounds[0]) == 2
    assert comparison.old.last_losses == comparison.new.last_losses


def test_a_session_opens_both_versions_of_the_pack(pack, monkeypatch):
    """Version 0.3.0 has nodes.host.training, later ones nodes.host.training_session."""
    calls = []
    core = SimpleNamespace(train=lambda *given, **named: calls.append((given, named)))
    monkeypatch.setattr("bench.training_session.importlib.import_module", lambda name: core)
    later = SimpleNamespace(training_session=lambda *given: nullcontext(("network", "images")))
    earlier = SimpleNamespace(training=lambda *given: nullcontext("trainable"))
    for host in (later, earlier):
        fake = SimpleNamespace(__name__="pack", nodes=SimpleNamespace(host=host))
        with training_session(fake, "model", [], []) as session:
            session.train("config", on_step=print)
    assert calls == [
        (("network", "images", "config"), {"on_step": print}),
        (("trainable", "config"), {"on_step": print}),
    ]


def test_a_config_has_the_given_settings(pack):
    assert make_config(pack, steps=7).steps == 7
