"""LoRA files of other programs, and of other models, in the real ComfyUI: what does not count is told on the node."""

import json
import logging
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

QKV, PROJ = (f"diffusion_model.joint_blocks.0.x_block.attn.{part}" for part in ("qkv", "proj"))
KOHYA, PEFT = ("lora_up", "lora_down"), ("lora_B", "lora_A")


@pytest.fixture(scope="module")
def model(pack):
    """The tiny base's MODEL; its QKV is (960, 320) and its PROJ (320, 320)."""
    with torch.inference_mode():
        return pack.nodes.tiny_base.ACLoRATinyBase.execute().result[0]


@pytest.fixture
def load(pack, loras, model, caplog):
    """Save tensors as a file, and load it onto the model: the model with it, and the table on the node."""

    def run(state, metadata=None, **inputs):
        save_file(state, loras / "x.safetensors", metadata)
        with caplog.at_level(logging.WARNING):
            changed, _, _, table, _ = pack.nodes.adapter.load.ACLoRALoad.execute(
                "x.safetensors", model=model, **inputs
            ).args
        return changed, table

    return run


def pair(base, out=None, inner=320, rank=4, spelling=KOHYA, **alpha):
    up, down = spelling
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{base}.{up}.weight": torch.randn(out or (960 if base == QKV else 320), rank, generator=generator) * 0.05,
        f"{base}.{down}.weight": torch.randn(rank, inner, generator=generator) * 0.05,
    }
    return state | {f"{base}.{key}": torch.tensor(value) for key, value in alpha.items()}


def change(model, changed, base=QKV):
    """What the LoRA adds to a weight, as ComfyUI computes it."""
    import comfy.lora

    key = f"{base}.weight"
    before = model.model.state_dict()[key].float()
    return comfy.lora.calculate_weight(changed.patches.get(key, []), before.clone(), key) - before


MISFITS = {
    "LoRA": pair(PROJ, out=640, inner=640),
    "LoHa": {
        **{f"{PROJ}.hada_w{side}_a": torch.ones(640, 2) for side in (1, 2)},
        **{f"{PROJ}.hada_w{side}_b": torch.ones(2, 640) for side in (1, 2)},
    },
    "LoKr": {f"{PROJ}.lokr_w1": torch.ones(4, 4), f"{PROJ}.lokr_w2": torch.ones(160, 160)},
    "OFT": {f"{PROJ}.oft_blocks": torch.zeros(4, 81, 81), f"{PROJ}.alpha": torch.tensor(1.0)},
    "DoRA": {**pair(PROJ), f"{PROJ}.dora_scale": torch.ones(7, 1)},
    "difference": {f"{PROJ}.diff": torch.ones(7, 7)},
    "replaced": {f"{PROJ}.set_weight": torch.ones(7, 7)},
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_layer_of_another_size_is_told_and_taken_out(model, load, caplog, kind):
    changed, table = load({**pair(QKV), **MISFITS[kind]})
    assert (
        "1 of the LoRA's 2 layers ignored, as only the name fits and not the size" in table
        and "a weight of 320 x 320" in table
    )
    assert changed.patches.keys() == {f"{QKV}.weight"} and not model.patches
    assert [record.name for record in caplog.records] == ["aclora"]


@pytest.mark.parametrize("kind", MISFITS)
def test_a_file_of_another_size_is_refused(load, kind):
    sentence = r"None of the 1 layers of 'x\.safetensors' fits by its size, though.*trained on sdxl.*Connect the model"
    with pytest.raises(ValueError, match=sentence):
        load(MISFITS[kind], {"ss_base_model_version": "sdxl_base_v1-0"})


def test_patches_of_a_lora_before_it_stay(pack, loras, model, load):
    first, _ = load(pair(PROJ))
    save_file({**pair(QKV), **MISFITS["LoRA"]}, loras / "second.safetensors")
    second = pack.nodes.adapter.load.ACLoRALoad.execute("second.safetensors", model=first)[0]
    assert len(second.patches[f"{PROJ}.weight"]) == len(first.patches[f"{PROJ}.weight"]) == 1


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({f"{QKV}.lora_magnitude_vector": torch.ones(960)}, "1 x DoRA magnitudes as PEFT stores them, without which"),
        ({f"{QKV}.lora_B.bias": torch.ones(960)}, "1 x bias of a LoRA's matrix"),
        ({f"{QKV}.scalar": torch.tensor(0.5)}, "1 x scalar of a layer"),
        ({"bundle_emb.ink.string_to_param.*": torch.ones(2, 4)}, "1 x bundled embedding"),
        ({f"{PROJ}.alpha": torch.tensor(2.0)}, "1 x alpha without matrices"),
        ({f"{PROJ}.lora_A.weight": torch.ones(4, 320)}, "1 x half a pair"),
        ({f"{PROJ}.lora_up.weight": torch.ones(320, 4)}, "1 x half a pair"),
        (pair(PROJ, rank=0, alpha=1.0), "1 x layer of rank 0"),
    ],
)
def test_what_is_left_out_is_told_by_every_node_that_loads(pack, loras, model, load, caplog, beside, words):
    state = {**pair(QKV, spelling=PEFT), **beside}
    changed, table = load(state)
    assert words in table and changed.patches.keys() == {f"{QKV}.weight"} and not caplog.records
    inspect, resize = pack.nodes.adapter.inspect.ACLoRAInspect, pack.nodes.adapter.resize.ACLoRAResize
    shown = inspect.execute("x.safetensors").ui["text"][0]
    assert words in shown
    whole = {key.replace(QKV, PROJ): tensor for key, tensor in pair(QKV, out=320).items() if "magnitude" not in key}
    if not any(key.startswith(PROJ) for key in beside):
        save_file({**state, **whole}, loras / "x.safetensors")
    lost = resize.execute("x.safetensors", {"rule": "fixed", "rank": 2})[1]
    assert words in lost


def test_save_tells_what_it_keeps_and_what_it_leaves_out(pack, loras):
    state = {**pair(QKV), "bundle_emb.ink.clip_l": torch.ones(2, 4), "y.alpha": torch.tensor(1.0)}
    output = pack.nodes.adapter.save.ACLoRASave.execute(state, "ink", overwrite=True)
    text = output.ui.as_dict()["text"][0]
    assert "\nleft out: 1 x alpha without matrices: 'y'" in text
    assert "\nkept, though ComfyUI does not use it: 1 x bundled embedding" in text and text.count("bundle_emb") == 1
    assert {key for key in load_file(loras / output[0]) if "y." in key or "emb" in key} == {"bundle_emb.ink.clip_l"}


def test_a_stray_alpha_is_loaded_as_the_host_does(model, load):
    import comfy.sd

    state = {**pair(QKV, alpha=2.0), f"{PROJ}.alpha": torch.tensor(2.0)}
    by_host, _ = comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0.0)
    assert torch.equal(change(model, load(state)[0]), change(model, by_host))


def test_the_alpha_in_the_header_is_applied_and_kept_by_resize_and_save(pack, loras, model, load):
    state = pair(QKV, spelling=PEFT)
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, "transformer.r": 4})}
    meant = 0.25 * state[f"{QKV}.lora_B.weight"] @ state[f"{QKV}.lora_A.weight"]
    changed, table = load(state, header)
    torch.testing.assert_close(change(model, changed), meant, rtol=1e-4, atol=1e-6)
    assert "scale 0.25" in table
    cut = pack.nodes.adapter.resize.ACLoRAResize.execute("x.safetensors", {"rule": "fixed", "rank": 4})[0]
    name = pack.nodes.adapter.save.ACLoRASave.execute(cut, "cut", precision="fp32")[0]
    saved = load_file(loras / name)
    scale = saved[f"{QKV}.alpha"] / 4
    delta = scale * saved[f"{QKV}.lora_up.weight"] @ saved[f"{QKV}.lora_down.weight"]
    torch.testing.assert_close(delta, meant, rtol=1e-2, atol=1e-4)
    with safe_open(loras / name, "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()


@pytest.mark.parametrize("way", ["load", "load truncated", "resize"])
def test_what_a_file_says_survives_the_way_through_the_nodes(pack, loras, way):
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_training_comment": "by hand",
        "modelspec.trigger_phrase": "inky",
        "modelspec.author": "somebody",
        "modelspec.license": "CC-BY-4.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "ss_tag_frequency": json.dumps({"10_ink": {"inky": 3}}),
    }
    save_file(pair(QKV), loras / "bought.safetensors", metadata)
    nodes, cut = pack.nodes.adapter, {"rank": 2}
    if way == "resize":
        lora_model = nodes.resize.ACLoRAResize.execute("bought.safetensors", {"rule": "fixed", **cut})[0]
    else:
        choice = {"cut": "rank", **cut} if way == "load truncated" else {"cut": "no cut"}
        lora_model = nodes.load.ACLoRALoad.execute("bought.safetensors", cut=choice)[2]
    name = nodes.save.ACLoRASave.execute(lora_model, "small")[0]
    with safe_open(loras / name, "pt") as file:
        written = file.metadata()
    comment = written["ss_training_comment"]
    assert (
        comment == "by hand"
        if way == "load"
        else comment == "by hand; truncated by AC-LoRA from rank 4 to rank 2, rule 'fixed'"
    )
    assert written.items() >= {**metadata, "ss_training_comment": comment}.items()
    assert written["ss_network_dim"] == ("4" if way == "load" else "2")


def test_a_damaged_file_of_ours_is_refused_by_every_node(pack, loras, model):
    nodes = pack.nodes.adapter
    name = nodes.save.ACLoRASave.execute(pair(QKV), "ink")[0]
    blob = bytearray((loras / name).read_bytes())
    blob[-40] ^= 1
    (loras / name).write_bytes(blob)
    for run in (
        lambda: nodes.load.ACLoRALoad.execute(name, model=model),
        lambda: nodes.inspect.ACLoRAInspect.execute(name),
        lambda: nodes.resize.ACLoRAResize.execute(name, {"rule": "knee"}),
    ):
        with pytest.raises(ValueError, match=rf"^{name} is damaged: its numbers do not match the SHA-256"):
            run()


@pytest.mark.parametrize("strengths", [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_a_strength_that_is_no_number_is_refused(load, strengths):
    with pytest.raises(ValueError, match="The strengths must be numbers"):
        load(pair(QKV), strength_model=strengths[0], strength_clip=strengths[1])


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("%year%-%month%-%day%/ink", "2026-03-09/ink"),
        ("ink_%hour%%minute%%second%", "ink_070502"),
        ("%date:yyyy-MM-dd%/ink_%date:hhmmss%", "2026-03-09/ink_070502"),
        ("%date:yy.M.d%", "26.3.9"),
        ("100% ink", "100% ink"),
    ],
)
def test_dates_in_a_file_name_are_replaced(pack, given, written):
    from datetime import datetime

    assert pack.nodes.date_tokens.with_dates(given, datetime(2026, 3, 9, 7, 5, 2)) == written


def test_a_file_is_saved_under_the_name_that_the_hosts_own_node_gives(pack, loras, monkeypatch):
    import time

    import folder_paths

    save = pack.nodes.adapter.save.ACLoRASave
    given = "%year%-%month%/ink"
    assert save.validate_inputs(given) is True and save.validate_inputs("%date:yyyy%/ink") is True
    name = save.execute(pair(QKV), given)[0]
    assert os.path.dirname(name) == os.path.basename(folder_paths.get_save_image_path(given, str(loras))[0])
    assert name == os.path.join(time.strftime("%Y-%m"), "ink_00001.safetensors")


def test_the_character_that_cannot_be_in_a_name_is_named(pack):
    assert "the character ':'" in pack.nodes.adapter.save.ACLoRASave.validate_inputs("10:30")
    for name in ("con", "COM¹", "CONIN$", "lpt1.ink"):
        assert "device on Windows" in pack.nodes.adapter.save.ACLoRASave.validate_inputs(name)


@pytest.mark.parametrize("name", ["a" * 5000, "\ud800", "~nobody/../x", "a\x00b", "\ud800/" * 90])
def test_validation_refuses_any_name_and_does_not_raise(pack, loras, name):
    nodes = pack.nodes.adapter
    assert isinstance(nodes.save.ACLoRASave.validate_inputs(name), str)
    assert isinstance(nodes.load.ACLoRALoad.validate_inputs(name), str)
    assert isinstance(nodes.inspect.ACLoRAInspect.validate_inputs(name), str)


def test_inspect_survives_a_temporary_folder_that_cannot_be_written(pack, loras, tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "temp").write_text("a file in the place of the folder")
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    output = pack.nodes.adapter.inspect.ACLoRAInspect.execute("none", lora_model=pair(QKV))
    assert len(output.args[0]) == 3 and "images" not in output.ui
    assert "The images cannot be shown here: ComfyUI's temporary folder cannot be written to" in output.ui["text"][0]


def test_a_name_does_not_become_a_link_on_the_node_and_the_text_goes_to_the_page_that_asked(pack, monkeypatch):
    import sys
    from types import SimpleNamespace

    sent = []
    instance = SimpleNamespace(send_progress_text=lambda *given: sent.append(given), client_id="page", sockets={"page"})
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    pack.nodes.host.send_text("file: [[click|https://example.com]] \ud800", "1")
    instance.sockets = {"another"}  # the page was closed
    pack.nodes.host.send_text("file", "1")
    assert sent == [("file: [ [click|https://example.com]] \\ud800", "1", "page"), ("file", "1", None)]
