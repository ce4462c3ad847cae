"""A LoRA file that version 0.3.0 wrote is read: its matrices, its metadata and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aclora_core.adapter import RankReport, ResizeConfig, check_report, decompose, load, resize, save
from aclora_core.inspection import inspect_lora, inspection_json, inspection_table, metadata_table

FILES = Path(__file__).parent / "files"
LORA = FILES / "ink.safetensors"
TRAINED = json.loads((FILES / "resumed.json").read_text(encoding="utf-8"))


def metadata() -> dict[str, str]:
    with safe_open(LORA, framework="pt") as file:
        return dict(file.metadata())


def test_matrices_are_those_of_the_training_in_half_precision() -> None:
    (name, layer), *others = load(LORA).layers.items()
    assert (name, layer.rank, layer.scale, others) == ("toy.attn", 2, 1.0, [])
    trained = load_file(FILES / "resumed.safetensors")
    assert torch.equal(layer.lora_down, trained["toy.attn.lora_down.weight"].half())
    assert torch.equal(layer.lora_up, trained["toy.attn.lora_up.weight"].half())


def test_report_is_read() -> None:
    report, adapter = RankReport.from_json(metadata()["aclora.trajectory"]), load(LORA)
    check_report(adapter, report)
    assert report.losses == pytest.approx(TRAINED["losses"], rel=1e-3)
    assert [step for step, _ in report.validation] == [step for step, _ in TRAINED["validation"]]
    assert [cut.name for cut in report.cuts] == [name for name, _, _ in TRAINED["cuts"]]
    assert report.restarts and report.layer_names() == ["toy.attn"]
    assert report.settings.items() >= TRAINED["settings"].items()


def test_settings_of_the_training_are_read() -> None:
    settings = json.loads(metadata()["aclora.settings"])
    assert settings.items() >= {**TRAINED["settings"], **TRAINED["facts"]}.items()


def test_metadata_is_shown_with_settings_and_results() -> None:
    lines = [line.split(maxsplit=1) for line in metadata_table("ink.safetensors", load(LORA)).splitlines()]
    shown = {words[0]: words[1] for words in lines if len(words) == 2}
    assert (shown["file"], shown["max_rank"], shown["restart_every"]) == ("ink.safetensors", "4", "2")
    assert shown["modelspec.trigger_phrase"] == "inkstyle" and "rank 2" in shown["given"]


def test_lora_is_inspected_with_the_report_in_it() -> None:
    inspected = inspect_lora(load_file(LORA), metadata())
    (layer,) = inspected.layers
    report = RankReport.from_json(metadata()["aclora.trajectory"])
    assert inspected.report == report
    assert (layer.name, layer.rank, layer.signal) == ("toy.attn", 2, report.signal["toy.attn"])
    assert "toy.attn" in inspection_table(inspected)
    assert json.loads(inspection_json(inspected))["layers"][0]["name"] == "toy.attn"


def test_lora_is_resized() -> None:
    adapter = load(LORA)
    resized, stats = resize(adapter, decompose(adapter), ResizeConfig(rule="fixed", value=1))
    assert resized.layers["toy.attn"].rank == 1 and stats.keys() == {"toy.attn"}


def test_lora_is_saved_again_with_the_same_keys_and_tensors(tmp_path: Path) -> None:
    save(load(LORA), tmp_path / "again.safetensors", metadata())
    before, after = load_file(LORA), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
