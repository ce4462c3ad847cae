"""Load AC-LoRA truncating a file, and its table, in the real ComfyUI."""

import json
import re
from dataclasses import replace
from urllib.error import HTTPError

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.known_loras import attention_names, halving_lora

NAMES = attention_names(2)
LOKR = {"diffusion_model.a.lokr_w1": torch.ones(2, 2), "diffusion_model.a.lokr_w2": torch.ones(2, 2)}


def lora(rank=6):
    return halving_lora(NAMES, rank)


@pytest.fixture
def load(pack):
    """The node's work: file name and cut -> LORA_MODEL and table."""

    def run(name, **cut):
        return pack.nodes.adapter.load.ACLoRALoad.execute(name, cut=cut or None).args[2:4]

    return run


def saved(pack, signal=None, **settings):
    """A file of Save AC-LoRA's, with a report that knows the signal of some layers."""
    report = None
    if signal is not None:
        core = pack.aclora_core.adapter
        spectrum = {name: [1.0, 0.5] for name in NAMES}
        report = core.RankReport({"seed": 7, **settings}, [0.5] * 9, [(3, 0.45), (6, 0.41)], [], spectrum, signal)
        report = replace(
            report, truncations=[core.TruncationLoss(core.Truncation.from_name("rank 2"), 2.0, 4000, 0.4, 0.0, True)]
        )
    return pack.nodes.adapter.save.ACLoRASave.execute(lora(), "ink", precision="fp32", rank_report=report)[0]


def ranks(state):
    return [state[f"{name}.lora_up.weight"].shape[1] for name in NAMES]


@pytest.mark.parametrize(
    ("cut", "rank"),
    [
        ({"cut": "no cut"}, 6),
        ({"cut": "rank", "rank": 4}, 4),
        ({"cut": "rank", "rank": 99}, 6),
        ({"cut": "energy", "keep": 0.93}, 2),
        ({"cut": "energy", "keep": 0.95}, 3),
    ],
    ids=str,
)
def test_the_lora_has_the_rank_that_was_asked_for(pack, loras, load, cut, rank):
    name = saved(pack)
    before = (loras / name).read_bytes()
    state, _ = load(name, **cut)
    assert ranks(state) == [rank] * len(NAMES)
    for layer in NAMES:
        whole = load_file(loras / name)
        u, s, vh = torch.linalg.svd(whole[f"{layer}.lora_up.weight"] @ whole[f"{layer}.lora_down.weight"])
        scale = float(state[f"{layer}.alpha"]) / rank
        delta = scale * state[f"{layer}.lora_up.weight"] @ state[f"{layer}.lora_down.weight"]
        torch.testing.assert_close(delta, u[:, :rank] * s[:rank] @ vh[:rank], rtol=1e-4, atol=1e-5)
    assert (loras / name).read_bytes() == before


def test_the_signal_comes_from_the_file_s_own_report(pack, loras, load):
    state, table = load(saved(pack, dict(zip(NAMES, (1, 2, 3, 9), strict=True))), cut="signal")
    assert ranks(state) == [1, 2, 3, 6]
    assert "to the signal of its training" in table and "6 in every layer -> 1 to 6, mean 3.0" in table


@pytest.mark.parametrize("signal", [None, {NAMES[0]: 2}], ids=["no report", "not of all layers"])
def test_without_a_known_signal_one_sentence_says_what_to_do(pack, loras, load, signal):
    name = saved(pack, signal)
    with pytest.raises(ValueError, match="has no signal ranks of its training") as caught:
        load(name, cut="signal")
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        ({"cut": "rank", "rank": 0}, "truncated to rank 1 or more, but the rank is 0"),
        ({"cut": "energy", "keep": 0.0}, "ink_00001.safetensors: The share to keep must be above 0 and at most 1"),
        ({"cut": "energy", "keep": float("nan")}, "at most 1, but is nan"),
        ({"cut": "guess"}, "no cut named 'guess'. Choose one of no cut, rank, energy, signal"),
    ],
    ids=["rank", "share", "nan", "name"],
)
def test_a_bad_value_gets_one_sentence(pack, loras, load, cut, sentence):
    name = saved(pack)
    with pytest.raises(ValueError) as caught:
        load(name, **cut)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_other_kinds_pass_through_with_a_sentence(loras, load):
    save_file(LOKR, loras / "lokr.safetensors")
    state, table = load("lokr.safetensors", cut="rank", rank=1)
    assert state.keys() == LOKR.keys() and all(torch.equal(state[key], LOKR[key]) for key in LOKR)
    assert "not done: there is no plain LoRA layer to truncate, only LoKr, which stays whole" in table
    save_file({**lora(), **LOKR}, loras / "both.safetensors")
    state, table = load("both.safetensors", cut="rank", rank=1)
    assert ranks(state) == [1] * 4 and LOKR.keys() <= state.keys()
    assert any(line.split() == ["not", "truncated", "LoKr,", "which", "stays", "whole"] for line in table.splitlines())


def test_the_table_has_file_truncation_training_and_metadata_in_two_columns(pack, loras, load):
    _, table = load(saved(pack, dict.fromkeys(NAMES, 2), optimizer="AdamW"), cut="rank", rank=2)
    facts, training, metadata = table.split("\n\n")
    column = facts.index("ink_00001.safetensors")
    for line in table.replace("\n\n", "\n").splitlines():
        assert line in ("Training", "Metadata") or (line[column - 1] == " " and line[column] != " "), line
    lines = [" ".join(line.split()) for line in table.splitlines()]
    for expected in (
        "layers 4 LoRA layers, rank 6, float32",
        "truncated to rank 2",
        "ranks 6 in every layer -> 2 in every layer",
        "energy kept 93.77%, so the change differs by 25.0% of its size",
        "optimizer AdamW",
        "signal ranks 2 in every layer",
        "validation loss 0.4100 at step 6, the lowest of 2",
        "given rank 2, of 1 truncations that were tried",
        "modelspec.title ink_00001",
    ):
        assert expected in lines
    assert any(re.fullmatch(r"size of the file [\d.]+ kB -> [\d.]+ kB \(\d+%\)", line) for line in lines)
    assert "seed" in training and "ss_seed" in metadata and "{" not in training and "aclora." not in table


def test_the_report_of_the_file_comes_out_and_fits_the_truncated_lora(pack, loras):
    load, inspect = pack.nodes.adapter.load.ACLoRALoad.execute, pack.nodes.adapter.inspect.ACLoRAInspect.execute
    signal = dict.fromkeys(NAMES, 3)
    _, _, state, _, report = load(saved(pack, signal), cut={"cut": "rank", "rank": 2}).args
    assert (
        report.signal == signal
        and report.settings["seed"] == 7
        and [tried.chosen for tried in report.truncations] == [True]
    )
    layers = json.loads(inspect("none", lora_model=state, rank_report=report)[2])["layers"]
    assert {(layer["rank"], layer["signal"]) for layer in layers} == {(2, 2)}


def test_without_a_report_the_nodes_behind_do_without(pack, loras):
    _, _, state, _, report = pack.nodes.adapter.load.ACLoRALoad.execute(saved(pack)).args
    assert report is None
    charts = pack.nodes.adapter.inspect.ACLoRAInspect.execute("none", lora_model=state, rank_report=report)[0]
    assert len(charts) == 3


def test_without_a_truncation_the_table_has_no_rows_on_it(pack, loras, load):
    _, table = load(saved(pack))
    assert "truncated" not in table and "->" not in table


def node(name, **inputs):
    return {"class_type": "ACLoRALoad", "inputs": {"lora_name": name, **inputs}}


def preview(output):
    return {"class_type": "PreviewAny", "inputs": {"source": ["1", output]}}


@pytest.fixture
def file(server):
    save_file(lora(), server.base / "models" / "loras" / "to_load.safetensors")
    return "to_load.safetensors"


STRENGTHS = {"strength_model": 1.0, "strength_clip": 1.0}


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ({}, None),  # as a workflow from before this input existed
        ({"cut": "no cut"}, None),
        ({"cut": "rank", "cut.rank": 2}, "to rank 2"),
        ({"cut": "energy", "cut.keep": 0.93}, "to 0.93 of the energy"),
    ],
    ids=str,
)
def test_a_prompt_truncates_while_loading(server, file, cut, words):
    history = server.run({"1": node(file, **STRENGTHS, **cut), "2": preview(3)})
    table = history["outputs"]["2"]["text"][0]
    assert (words in table and "6 in every layer -> 2 in every layer" in table) if words else "->" not in table


@pytest.mark.parametrize(
    ("cut", "word"),
    [
        ({"cut": "rank", "cut.rank": 0}, "rank"),
        ({"cut": "rank"}, "rank"),
        ({"cut": "energy", "cut.keep": 1.5}, "keep"),
        ({"cut": "energy", "cut.keep": "much"}, "keep"),
    ],
    ids=str,
)
def test_a_number_outside_its_range_is_refused_before_anything_runs(server, file, cut, word):
    with pytest.raises(HTTPError) as refusal:
        server.post_json("/prompt", {"prompt": {"1": node(file, **STRENGTHS, **cut), "2": preview(3)}})
    errors = json.loads(refusal.value.read())["node_errors"]
    assert errors.keys() == {"1"} and word in errors["1"]["errors"][0]["details"]


def test_an_unknown_cut_is_no_silent_load_of_the_whole(server, file):
    history = server.wait(server.submit({"1": node(file, **STRENGTHS, cut="guess"), "2": preview(3)}))
    kind, event = history["status"]["messages"][-1]
    assert kind == "execution_error" and event["node_id"] == "1"
    assert "no cut named 'guess'. Choose one of no cut, rank" in event["exception_message"]
