"""Inspecting and resizing LoRAs in the real ComfyUI."""

import json
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.known_loras import attention_names, halving_lora

NAMES = attention_names(3)
BROKEN = f"{NAMES[1]}.lora_up.weight"


def lora(rank=6):
    return halving_lora(NAMES, rank)


@pytest.fixture
def inspect(pack):
    return pack.nodes.adapter.inspect.ACLoRAInspect


@pytest.fixture
def resize(pack):
    return pack.nodes.adapter.resize.ACLoRAResize


def report(pack, names=NAMES, signal=2):
    core = pack.aclora_core.adapter
    ranks = {name: pack.aclora_core.method.LayerRank(3, 3, signal, 0.9) for name in names}
    restarts = [core.Restart(step, 1, 0.5, 0.5, ranks) for step in (3, 6)]
    spectrum = {name: [1.0, 0.5] for name in names}
    return core.RankReport({"seed": 7}, [0.9, 0.5, 0.4] * 3, [], restarts, spectrum, dict.fromkeys(names, signal))


def test_a_connected_lora_becomes_charts_table_json_and_csv(inspect):
    state = lora()
    before = {key: tensor.clone() for key, tensor in state.items()}
    output = inspect.execute("none", lora_model=state)
    charts, table, text, csv = output.args
    assert charts.shape == (3, 640, 1024, 3) and charts.dtype == torch.float32
    assert 0.0 <= charts.min() and charts.max() <= 1.0 and charts.std() > 0.05
    assert all(name in table and name in csv for name in NAMES)
    assert [layer["rank"] for layer in json.loads(text)["layers"]] == [6] * len(NAMES)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert len(output.ui["images"]) == 1 and "6 plain LoRA layers in 3 blocks" in output.ui["text"][0]


@pytest.mark.parametrize("kind", ["inspect", "resize"])
def test_a_cancel_stops_it_between_two_layers(request, kind):
    import comfy.model_management as management

    node = request.getfixturevalue(kind)
    more = [{"rule": "fixed", "rank": 2}] if kind == "resize" else []
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        node.execute("none", *more, lora_model=lora())
    assert not management.processing_interrupted()


@pytest.mark.parametrize(
    ("palette", "switch", "is_dark"), [("light", False, False), ("light", True, True), ("nord", False, True)]
)
def test_charts_follow_the_colour_palette_or_are_dark(inspect, palette, switch, is_dark, node_palette):
    node_palette(palette)
    output = inspect.execute("none", switch, lora_model=lora())
    assert (output[0].mean() < 0.5) == is_dark
    assert (shown_on(output).mean() < 128) == is_dark


@pytest.fixture
def node_palette(tmp_path, monkeypatch):
    """Set the front end's colour palette, as the server keeps it."""
    import folder_paths

    def choose(name):
        settings = tmp_path / "default" / "comfy.settings.json"
        settings.parent.mkdir()
        settings.write_text(json.dumps({"Comfy.ColorPalette": name}), encoding="utf-8")

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return choose


def shown_on(output):
    """The image on the node, as numbers."""
    import folder_paths

    (shown,) = output.ui["images"]
    with Image.open(Path(folder_paths.get_temp_directory(), shown["subfolder"], shown["filename"])) as image:
        return np.asarray(image.convert("L"))


def test_the_chart_on_the_node_has_letters_of_twice_the_size(inspect, node_palette):
    """So that they can be read on a node of some 230 pixels, less than half as wide as the chart."""
    node_palette("light")
    output = inspect.execute("none", lora_model=lora())
    shown = shown_on(output)
    assert shown.shape == (320, 512)
    heading = np.nonzero((shown[:48] < 128).any(axis=1))[0]  # rows of pixels with ink
    assert np.ptp(heading) >= 16


def test_a_report_adds_the_training(pack, inspect):
    charts, table, text, _ = inspect.execute("none", lora_model=lora(), rank_report=report(pack)).args
    assert len(charts) == 5 and "Restarts" in table
    assert {layer["signal"] for layer in json.loads(text)["layers"]} == {2}


def test_a_report_of_another_training_gets_one_sentence(pack, inspect, resize):
    stranger = report(pack, ["diffusion_model.elsewhere"])
    for run in (
        lambda: inspect.execute("none", lora_model=lora(), rank_report=stranger),
        lambda: resize.execute("none", {"rule": "signal"}, lora_model=lora(), rank_report=stranger),
    ):
        with pytest.raises(ValueError, match="from another training: it lacks the layer") as caught:
            run()
        assert "\n" not in str(caught.value)


def test_a_saved_file_brings_its_own_report(pack, loras, inspect):
    name = pack.nodes.adapter.save.ACLoRASave.execute(lora(), "ink", rank_report=report(pack))[0]
    charts, table, text, _ = inspect.execute(name).args
    assert len(charts) == 5 and name in table
    assert json.loads(text)["training"]["settings"] == {"seed": 7}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "ink.safetensors is an empty file"),
        (b"no tensors at all, only text", "ink.safetensors"),
        ((2**31).to_bytes(8, "little") + b"{", "ink.safetensors"),
        ({"weight": torch.ones(2)}, "ink.safetensors: There is no LoRA in it"),
        ({f"{NAMES[0]}.lora_up.weight": torch.ones(4, 2)}, "lora_down.weight' is missing"),
        ({**lora(), BROKEN: torch.full((24, 6), torch.nan)}, f"{BROKEN}' holds NaN"),
    ],
    ids=["empty", "text", "huge header", "no lora", "unpaired", "nan"],
)
def test_a_bad_file_gets_one_sentence_that_names_it(loras, inspect, resize, content, sentence):
    path = loras / "ink.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    for run in (lambda: inspect.execute(path.name), lambda: resize.execute(path.name, {"rule": "energy", "keep": 0.9})):
        with pytest.raises(ValueError) as caught:
            run()
        assert sentence in str(caught.value) and str(caught.value).count("ink.safetensors") == 1
        assert "\n" not in str(caught.value)
    assert list(loras.iterdir()) == [path]


def test_a_lora_must_be_given(loras, inspect, resize):
    save_file(lora(), loras / "ink.safetensors")
    for node in (inspect, resize):
        rule = {"rule": {"rule": "knee"}} if node is resize else {}  # the host always hands the rule on
        assert node.validate_inputs("ink.safetensors", **rule) is True
        assert node.validate_inputs("none", lora_model=None, **rule) is True  # None stands for a link
        assert node.validate_inputs(None, **rule) is True
        assert "No LoRA is given" in node.validate_inputs("none", **rule)
        assert node.validate_inputs("ink.safetensors", lora_model=None, **rule) is True
        assert "no LoRA file 'gone.safetensors'" in node.validate_inputs("gone.safetensors", **rule)


def test_a_connected_lora_goes_before_a_chosen_file_and_the_nodes_say_so(pack, inspect, resize, monkeypatch):
    """One of two errors would be at an input that is right, as ComfyUI repeats it at each of both."""
    said = []
    monkeypatch.setattr(pack.nodes.host, "send_text", lambda text, node: said.append(text))
    inspect.execute("gone.safetensors", lora_model=lora())
    resize.execute("gone.safetensors", {"rule": "knee"}, lora_model=lora())
    sentence = "'gone.safetensors' is not used, as lora_model is connected."
    assert said[0].startswith(f"{sentence}\nname: the connected LoRA") and sentence in said[1]
    for node in (inspect, resize):
        assert node.fingerprint_inputs("gone.safetensors", lora_model=None) == ""


def test_a_changed_file_makes_the_nodes_run_again(loras, inspect, resize):
    for node in (inspect, resize):
        save_file(lora(), loras / "ink.safetensors")
        before = node.fingerprint_inputs("ink.safetensors")
        assert before == node.fingerprint_inputs("ink.safetensors") != ""
        save_file(lora(4), loras / "ink.safetensors")
        assert before != node.fingerprint_inputs("ink.safetensors")
        assert node.fingerprint_inputs("none") == ""


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        ({"rule": "energy", "keep": 0.93}, 2),
        ({"rule": "fixed", "rank": 4}, 4),
        ({"rule": "signal"}, 2),
        ({"rule": "sum", "keep": 0.9}, 4),
        ({"rule": "frobenius", "keep": 0.98}, 3),
        ({"rule": "ratio", "ratio": 0.2}, 3),
        ({"rule": "threshold", "smallest": 0.3}, 2),
        ({"rule": "knee"}, 2),
        ({"rule": "noise_floor"}, 1),
        ({"rule": "file size", "megabytes": 1.0, "drop_layers": False}, 6),
    ],
    ids=lambda value: value["rule"] if isinstance(value, dict) else str(value),
)
def test_every_rule_of_the_node_cuts(pack, resize, rule, rank):
    state = lora()
    result, text = resize.execute("none", rule, lora_model=state, precision="fp32", rank_report=report(pack)).args
    assert {result[f"{name}.lora_up.weight"].shape for name in NAMES} == {(24, rank)}
    for name in NAMES:
        delta = result[f"{name}.lora_up.weight"] @ result[f"{name}.lora_down.weight"]
        u, s, vh = torch.linalg.svd(state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"])
        torch.testing.assert_close(delta, u[:, :rank] * s[:rank] @ vh[:rank], rtol=1e-4, atol=1e-5)
    assert f"Sum of ranks: 36 -> {6 * rank}" in text


def test_every_rule_that_the_node_offers_is_known_and_explained(resize):
    rule = next(each for each in resize.define_schema().inputs if each.id == "rule")
    assert [option.key for option in rule.options] == [
        "energy",
        "signal",
        "file size",
        "fixed",
        "sum",
        "frobenius",
        "ratio",
        "threshold",
        "knee",
        "noise_floor",
    ]
    assert all(each.tooltip for option in rule.options for each in option.inputs)


def test_a_dry_run_reports_the_loss_and_gives_no_lora(resize):
    from comfy_execution.graph_utils import ExecutionBlocker

    rule = {"rule": "fixed", "rank": 1}
    wet, dry = (resize.execute("none", rule, lora_model=lora(), dry_run=is_dry) for is_dry in (False, True))
    assert isinstance(dry[0], ExecutionBlocker) and isinstance(wet[0], dict)
    assert dry[1].endswith(wet[1]) and dry[1].startswith("Dry run")


@pytest.mark.parametrize("megabytes", [0.008, 0.02])
def test_a_file_is_saved_within_the_size_that_was_asked_for(pack, loras, resize, megabytes):
    found = report(pack)
    rule = {"rule": "file size", "megabytes": megabytes, "drop_layers": False}
    result = resize.execute("none", rule, lora_model=lora(20), rank_report=found)[0]
    name = pack.nodes.adapter.save.ACLoRASave.execute(result, "a name of some length", rank_report=found)[0]
    assert 0.8 * megabytes < (loras / name).stat().st_size / 1e6 <= megabytes


def test_the_host_applies_the_cut_lora(pack, resize):
    import comfy.lora

    result = resize.execute("none", {"rule": "fixed", "rank": 2}, lora_model=lora())[0]
    keys = {name: f"{name}.weight" for name in NAMES}
    assert comfy.lora.load_lora(result, keys).keys() == set(keys.values())


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_a_prompt_inspects_cuts_and_saves_through_the_server(server):
    save_file(lora(), server.base / "models" / "loras" / "to_cut.safetensors")
    prompt = {
        "1": node("ACLoRAInspect", lora_name="to_cut.safetensors", dark=True),
        "2": node(
            "ACLoRAResize",
            lora_name="to_cut.safetensors",
            rule="fixed",
            **{"rule.rank": 2},
            max_rank=0,
            precision="fp16",
            dry_run=False,
        ),
        "3": node("ACLoRASave", lora_model=["2", 0], filename="cut", precision="fp16", overwrite=True),
        "4": node("ACLoRAInspect", lora_name="none", lora_model=["2", 0], dark=False),
        "5": node("PreviewAny", source=["2", 1]),
        "6": node("SaveImage", images=["4", 0], filename_prefix="charts"),
    }
    history = server.run(prompt)
    assert len(history["outputs"]["1"]["images"]) == len(history["outputs"]["4"]["images"]) == 1
    assert len(server.images(history)) == 3
    assert "6 plain LoRA layers in 3 blocks, rank 2" in history["outputs"]["4"]["text"][0]
    assert "Sum of ranks: 36 -> 12" in history["outputs"]["5"]["text"][0]
    assert (server.base / "models" / "loras" / "cut.safetensors").is_file()


RESIZE = {"lora_name": "whole.safetensors", "max_rank": 0, "precision": "fp16", "dry_run": False}


@pytest.mark.parametrize(
    ("kind", "inputs", "word"),
    [
        ("ACLoRAInspect", {"lora_name": "none", "dark": False}, "No LoRA is given"),
        ("ACLoRAInspect", {"lora_name": "gone.safetensors", "dark": False}, "no LoRA file 'gone.safetensors'"),
        ("ACLoRAResize", {**RESIZE, "rule": "knee", "lora_name": "none"}, "No LoRA is given"),
        ("ACLoRAResize", {**RESIZE, "rule": "energy", "rule.keep": 1.5}, "keep"),
        ("ACLoRAResize", {**RESIZE, "rule": "fixed", "rule.rank": 0}, "rank"),
        ("ACLoRAResize", {**RESIZE, "rule": "knee", "max_rank": -1}, "max_rank"),
        ("ACLoRAResize", {**RESIZE, "rule": "guess"}, "There is no such rule. Choose one of energy, signal"),
    ],
    ids=["no LoRA", "no file", "nothing to truncate", "share", "rank", "largest rank", "rule"],
)
def test_bad_settings_are_refused_before_anything_runs(server, kind, inputs, word):
    save_file(lora(), server.base / "models" / "loras" / "whole.safetensors")
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}
    with pytest.raises(HTTPError) as refusal:
        server.post_json("/prompt", {"prompt": {"1": node(kind, **inputs), "2": shown}})
    errors = json.loads(refusal.value.read())["node_errors"]
    assert errors.keys() == {"1"} and any(word in error["details"] for error in errors["1"]["errors"])


def test_a_dry_run_saves_nothing_and_still_reports(server):
    save_file(lora(), server.base / "models" / "loras" / "whole.safetensors")
    prompt = {
        "1": node("ACLoRAResize", **{**RESIZE, "rule": "fixed", "rule.rank": 1, "dry_run": True}),
        "2": node("ACLoRASave", lora_model=["1", 0], filename="never", precision="fp16", overwrite=True),
        "3": node("PreviewAny", source=["1", 1]),
    }
    outputs = server.wait(server.submit(prompt))["outputs"]
    assert "Sum of ranks: 36 -> 6" in outputs["3"]["text"][0] and "2" not in outputs
    assert not (server.base / "models" / "loras" / "never.safetensors").exists()
