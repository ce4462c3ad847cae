"""Saving and loading LoRAs in the real ComfyUI."""

import base64
import io
import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

QKV = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
CONVOLUTION = "diffusion_model.x_embedder.proj"


@pytest.fixture
def loras(pack, tmp_path, monkeypatch):
    """An empty models/loras of this test's own."""
    import folder_paths

    folder = tmp_path / "loras"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors", ".sft", ".pt"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield folder
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.fixture(scope="module")
def model(pack):
    """A random model of SD3's kind with 128 channels, loaded as a checkpoint file would be."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    torch.manual_seed(0)
    context = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
    network = MMDiT(
        None,
        depth=2,
        in_channels=16,
        adm_in_channels=64,
        context_embedder_config=context,
        num_patches=64,
        pos_embed_max_size=8,
        pos_embed_scaling_factor=None,
        context_size=64,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    weights = {key: torch.randn_like(weight) * 0.02 for key, weight in network.state_dict().items()}
    return comfy.sd.load_diffusion_model_state_dict(weights)


@pytest.fixture(scope="module")
def clip(pack):
    """A random CLIP text model of two narrow layers."""
    import comfy.sd
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer

    class Target:
        params = {}
        clip = SD1ClipModel
        tokenizer = SD1Tokenizer

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    torch.manual_seed(0)
    made = comfy.sd.CLIP(Target, model_options={"clip_l_model_config": sizes})
    for parameter in made.cond_stage_model.parameters():
        parameter.data.normal_()  # the host leaves the memory as it finds it
    return made


def weight_of(patcher, name):
    return patcher.model.state_dict()[name]


def lora_for(model, rank=3, seed=1):
    """A random LoRA on every Linear layer of the blocks and on the convolution before them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in model.model.state_dict().items():
        base, is_weight, _ = name.partition(".weight")
        if is_weight and ("joint_blocks" in base and weight.ndim == 2 or base == CONVOLUTION):
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            state[f"{base}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
            state[f"{base}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.1
            state[f"{base}.alpha"] = torch.tensor(2.0)
    return state


def patched_weight(patcher, name):
    """The weight as sampling sees it, in float32."""
    import comfy.lora

    return comfy.lora.calculate_weight(patcher.patches[name], weight_of(patcher, name).float().clone(), name)


def test_a_saved_lora_goes_through_the_stock_loader_without_a_warning(pack, loras, model, caplog):
    import nodes

    state = lora_for(model)
    name = pack.nodes.adapter.save.ACLoRASave.execute(state, "styles/ink", precision="fp32")[0]
    with caplog.at_level(logging.WARNING):
        changed, _ = nodes.LoraLoader().load_lora(model, None, name, 0.5, 0.0)
    assert not caplog.records
    up, down = state[f"{QKV}.lora_up.weight"], state[f"{QKV}.lora_down.weight"]
    expected = weight_of(model, f"{QKV}.weight").float() + 0.5 * (2.0 / 3.0) * up @ down
    torch.testing.assert_close(patched_weight(changed, f"{QKV}.weight"), expected, rtol=1e-4, atol=1e-5)
    assert len(changed.patches) == len(state) // 3 and not model.patches


def test_every_loader_lists_the_file_at_once(pack, loras, model):
    import folder_paths

    import nodes

    assert folder_paths.get_filename_list("loras") == []
    state = lora_for(model)
    names = [
        pack.nodes.adapter.save.ACLoRASave.execute(state, f"{place}ink")[0] for place in ("", "styles/", "styles/new/")
    ]
    assert sorted(names) == folder_paths.get_filename_list("loras")
    assert set(names) <= set(nodes.LoraLoader.INPUT_TYPES()["required"]["lora_name"][0])
    combo = pack.nodes.adapter.load.ACLoRALoad.define_schema().inputs[0]
    assert combo.id == "lora_name" and set(names) == set(combo.options)


def test_a_drive_with_coarse_times_hides_no_file(pack, loras, model):
    import folder_paths

    loras.mkdir()
    time = os.stat(loras).st_mtime_ns
    assert folder_paths.get_filename_list("loras") == []
    name = pack.nodes.adapter.save.ACLoRASave.execute(lora_for(model), "ink")[0]
    os.utime(loras, ns=(time, time))  # as if the two had happened within one tick
    assert folder_paths.get_filename_list("loras") == [name]


@pytest.mark.parametrize("style", range(7))
def test_a_file_in_any_key_style_changes_the_model_as_the_host_would(pack, loras, model, style):
    import comfy.sd

    form = pack.aclora_core.adapter.key_formats.KEY_FORMATS[style]
    state = {}
    for key, tensor in lora_for(model).items():
        base = key.replace(CONVOLUTION, "lora_unet_x_embedder_proj")
        base = base.replace(".lora_up.weight", form.up).replace(".lora_down.weight", form.down)
        state[base] = tensor
    loras.mkdir()
    save_file(state, loras / "style.safetensors")
    by_host, _ = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)
    by_node = pack.nodes.adapter.load.ACLoRALoad.execute("style.safetensors", model=model)[0]
    assert by_host.patches.keys() == by_node.patches.keys() and len(by_host.patches) == len(state) // 3
    for name in (f"{QKV}.weight", f"{CONVOLUTION}.weight"):
        changed = patched_weight(by_node, name)
        assert not torch.equal(changed, weight_of(model, name).float())
        torch.testing.assert_close(changed, patched_weight(by_host, name), rtol=0, atol=0)


def test_names_are_numbered_unless_overwriting_is_asked_for(pack, loras, model):
    save = pack.nodes.adapter.save.ACLoRASave.execute
    state = lora_for(model)
    assert save(state, "ink")[0] == "ink_00001.safetensors"
    assert save(state, "ink.safetensors")[0] == "ink_00002.safetensors"
    (loras / "ink_00007.safetensors").touch()
    assert save(state, "ink")[0] == "ink_00008.safetensors"
    assert save(state, "ink_2")[0] == "ink_2_00001.safetensors"
    assert save(state, "ink", overwrite=True)[0] == save(state, "ink", overwrite=True)[0] == "ink.safetensors"
    assert len(list(loras.iterdir())) == 6


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../ink", "leads outside models/loras"),
        ("styles/../../ink", "leads outside models/loras"),
        ("..\\ink", "leads outside models/loras"),
        ("/tmp/ink", "leads outside models/loras"),
        ("C:\\loras\\ink", "leads outside models/loras"),
        ("linked/ink", "leads outside models/loras through a link"),
        ("", "cannot be a file name"),
        ("styles/", "cannot be a file name"),
        (".hidden", "cannot be a file name"),
        ("what?", "cannot be a file name"),
        ("styles/nul.ink", "cannot be a file name"),  # a device, on Windows
        ("zero\x00byte", "cannot be a file name"),
        ("墨" * 100, "cannot be a file name"),
        ("taken/ink", "taken is not a writable folder"),
    ],
)
def test_a_bad_name_is_refused_before_the_run_and_nothing_is_written(pack, loras, model, tmp_path, name, sentence):
    loras.mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", loras / "linked")
    (loras / "taken").touch()
    node = pack.nodes.adapter.save.ACLoRASave
    assert sentence in node.validate_inputs(name)
    with pytest.raises(ValueError, match=sentence):
        node.execute(lora_for(model), name)
    assert sorted(path.name for path in loras.iterdir()) == ["linked", "taken"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["ink", "styles/ink", "styles\\ink", "ink.safetensors", "v1.5 ink (墨)", None])
def test_a_good_name_is_let_through(pack, loras, name):
    assert pack.nodes.adapter.save.ACLoRASave.validate_inputs(name) is True


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_the_file_has_the_precision_that_was_chosen(pack, loras, model, precision, dtype):
    import comfy.utils

    state = lora_for(model)
    name = pack.nodes.adapter.save.ACLoRASave.execute(state, "ink", precision=precision, format="ComfyUI")[0]
    saved = comfy.utils.load_torch_file(str(loras / name), safe_load=True)
    assert {tensor.dtype for key, tensor in saved.items() if "lora" in key} == {getattr(torch, dtype)}
    assert {tensor.dtype for key, tensor in saved.items() if "alpha" in key} == {torch.float32}
    assert state[f"{QKV}.lora_up.weight"].dtype == torch.float32


def test_a_saved_lora_loads_unchanged(pack, loras, model):
    state = lora_for(model)
    save, load = pack.nodes.adapter.save.ACLoRASave.execute, pack.nodes.adapter.load.ACLoRALoad.execute
    preview = torch.rand(1, 64, 64, 3)
    saved = save(state, "ink", precision="fp32", trigger=" tusche ", preview=preview, format="ComfyUI")
    changed, _, lora_model, table, _ = load(saved[0], strength_model=-1.5, model=model).args
    assert lora_model.keys() == state.keys()
    assert all(torch.equal(lora_model[key], state[key]) for key in state)
    delta = (2.0 / 3.0) * state[f"{QKV}.lora_up.weight"] @ state[f"{QKV}.lora_down.weight"]
    expected = weight_of(model, f"{QKV}.weight").float() - 1.5 * delta
    torch.testing.assert_close(patched_weight(changed, f"{QKV}.weight"), expected, rtol=1e-4, atol=1e-5)
    assert not model.patches
    assert "tusche" in table and "rank 3, float32" in table and "an image" in table
    assert changed.get_attachment("lora_metadata")["modelspec.trigger_phrase"] == "tusche"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_preview_of_any_channels_is_kept(pack, loras, model, channels):
    preview = torch.full((1, 64, 48, channels), 0.5)
    preview[0, 0, 0, 0] = float("nan")
    name = pack.nodes.adapter.save.ACLoRASave.execute(lora_for(model), f"grey{channels}", preview=preview)[0]
    with safe_open(loras / name, "pt") as file:
        url = file.metadata()["modelspec.thumbnail"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert image.mode == "RGB" and image.size == (48, 64)
        assert all(abs(value - 128) < 3 for value in image.getpixel((40, 40)))


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (1, 0, 64, 3), (64, 64), (1, 64, 64, 0)])
def test_a_preview_without_pixels_does_not_stop_the_save(pack, loras, model, shape):
    output = pack.nodes.adapter.save.ACLoRASave.execute(lora_for(model), "bare", preview=torch.zeros(shape))
    with safe_open(loras / output[0], "pt") as file:
        assert "modelspec.thumbnail" not in file.metadata()
    assert "without the preview: it is not an image" in output.ui.as_dict()["text"][0]


def test_a_cut_while_loading_puts_the_best_of_that_rank_on_the_model(pack, loras, model):
    state = lora_for(model, rank=6)
    name = pack.nodes.adapter.save.ACLoRASave.execute(state, "ink", precision="fp32")[0]
    cut = {"cut": "rank", "rank": 2}
    changed, _, lora_model, *_ = pack.nodes.adapter.load.ACLoRALoad.execute(name, 0.5, cut=cut, model=model).args
    u, s, vh = torch.linalg.svd(state[f"{QKV}.lora_up.weight"] @ state[f"{QKV}.lora_down.weight"], full_matrices=False)
    delta = (2.0 / 6.0) * (u[:, :2] * s[:2]) @ vh[:2]
    expected = weight_of(model, f"{QKV}.weight").float() + 0.5 * delta
    torch.testing.assert_close(patched_weight(changed, f"{QKV}.weight"), expected, rtol=1e-4, atol=1e-5)
    assert changed.patches.keys() == {f"{key.removesuffix('.alpha')}.weight" for key in state if "alpha" in key}
    assert {lora_model[key].shape[1] for key in lora_model if "lora_up" in key} == {2} and not model.patches


def test_the_text_on_the_node_has_folder_and_size(pack, loras, model):
    output = pack.nodes.adapter.save.ACLoRASave.execute(lora_for(model), "styles/ink")
    text = output.ui.as_dict()["text"][0]
    assert str(Path("styles", "ink_00001.safetensors")) in text
    size = (loras / output[0]).stat().st_size
    assert f": {size / 1e3:.1f} kB, " in text and "LoRA layers, rank 3" in text and "format: diffusers" in text


def test_a_rank_report_goes_into_the_file_and_a_strange_one_is_refused(pack, loras, model):
    import comfy.utils

    report_type = pack.aclora_core.adapter.rank_report.RankReport
    state = lora_for(model)
    bases = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]
    report = report_type({"seed": 7}, [0.5, 0.4], [], [], {base: [1.0] for base in bases}, dict.fromkeys(bases, 1))
    name = pack.nodes.adapter.save.ACLoRASave.execute(state, "ink", rank_report=report)[0]
    _, metadata = comfy.utils.load_torch_file(str(loras / name), return_metadata=True)
    assert metadata["ss_seed"] == "7" and metadata["ss_steps"] == "2" and metadata["aclora.trajectory"]
    stranger = report_type({}, [], [], [], {"diffusion_model.elsewhere": [1.0]}, {"diffusion_model.elsewhere": 1})
    with pytest.raises(ValueError, match="another training"):
        pack.nodes.adapter.save.ACLoRASave.execute(state, "other", rank_report=stranger)
    assert os.listdir(loras) == [name]


def test_text_encoder_layers_go_to_the_clip_and_are_summed_up_where_there_is_none(pack, loras, model, clip, caplog):
    state = lora_for(model)
    name = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1"
    for spelling in (f"text_encoders.{name}", "lora_te1_text_model_encoder_layers_0_mlp_fc1"):
        state[f"{spelling}.lora_up.weight"] = torch.ones(64, 2)
        state[f"{spelling}.lora_down.weight"] = torch.ones(2, 32)
    loras.mkdir()
    save_file(state, loras / "both.safetensors")
    load = pack.nodes.adapter.load.ACLoRALoad.execute
    with caplog.at_level(logging.WARNING):
        _, changed_clip, *_ = load("both.safetensors", strength_clip=0.5, model=model, clip=clip).args
    assert not caplog.records
    before = weight_of(clip.patcher, f"{name}.weight").float()
    torch.testing.assert_close(patched_weight(changed_clip.patcher, f"{name}.weight"), before + 0.5 * 2)
    assert len(changed_clip.patcher.patches) == 2 and not clip.patcher.patches
    with caplog.at_level(logging.WARNING):
        load("both.safetensors", model=model)
    assert [record.name for record in caplog.records] == ["aclora"]
    assert "6 of the LoRA's" in caplog.text
    caplog.clear()
    logging.getLogger().warning("lora key not loaded: x")
    assert caplog.records, "the host's own warnings must be back"


def test_a_lora_for_another_model_is_refused_by_name(pack, loras, model):
    loras.mkdir()
    state = {"lora_unet_other.lora_up.weight": torch.ones(2, 1), "lora_unet_other.lora_down.weight": torch.ones(1, 2)}
    save_file(state, loras / "other.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(ValueError, match=r"None of the 3 keys of 'other\.safetensors' fits.*trained on sdxl_base_v1-0"):
        pack.nodes.adapter.load.ACLoRALoad.execute("other.safetensors", model=model)


def test_strength_zero_and_no_model_leave_things_as_they_are(pack, loras, model):
    from comfy_execution.graph_utils import ExecutionBlocker

    load = pack.nodes.adapter.load.ACLoRALoad.execute
    name = pack.nodes.adapter.save.ACLoRASave.execute(lora_for(model), "ink")[0]
    same, no_clip, *_ = load(name, strength_model=0.0, model=model).args
    assert same is model
    assert isinstance(no_clip, ExecutionBlocker) and "clip input" in no_clip.message
    no_model, _, lora_model, *_ = load(name).args
    assert isinstance(no_model, ExecutionBlocker) and lora_model.keys() == lora_for(model).keys()


@pytest.mark.parametrize("kind", ["LoKr", "LoHa", "OFT", "DoRA"])
def test_other_kinds_are_loaded_by_the_host_and_named(pack, loras, model, kind, caplog):
    base, size = "diffusion_model.joint_blocks.0.x_block.attn.proj", 128
    states = {
        "LoKr": {f"{base}.lokr_w1": torch.ones(2, 2), f"{base}.lokr_w2": torch.ones(64, 64)},
        "LoHa": {
            **{f"{base}.hada_w{side}_a": torch.ones(size, 2) for side in (1, 2)},
            **{f"{base}.hada_w{side}_b": torch.ones(2, size) for side in (1, 2)},
        },
        "OFT": {f"{base}.oft_blocks": torch.zeros(4, 32, 32), f"{base}.alpha": torch.tensor(1.0)},
        "DoRA": {
            f"{base}.lora_B.weight": torch.ones(size, 2),
            f"{base}.lora_A.weight": torch.ones(2, size),
            f"{base}.dora_scale": torch.ones(size, 1),
        },
    }
    loras.mkdir()
    save_file(states[kind], loras / "other.safetensors")
    with caplog.at_level(logging.WARNING):
        changed, _, lora_model, table, _ = pack.nodes.adapter.load.ACLoRALoad.execute(
            "other.safetensors", model=model
        ).args
    assert not caplog.records and f"{base}.weight" in changed.patches
    assert lora_model.keys() == states[kind].keys()
    assert f"1 x {kind}" in table and "no plain LoRA layers" in table


def test_a_missing_file_is_refused_before_the_run(pack, loras):
    node = pack.nodes.adapter.load.ACLoRALoad
    assert "no LoRA file 'gone.safetensors'" in node.validate_inputs("gone.safetensors")
    assert node.validate_inputs(None) is True


def test_a_file_that_changed_is_read_again(pack, loras, model):
    fingerprint = pack.nodes.adapter.load.ACLoRALoad.fingerprint_inputs
    name = pack.nodes.adapter.save.ACLoRASave.execute(lora_for(model), "ink", overwrite=True)[0]
    before = fingerprint(lora_name=name, strength_model=1.0)
    assert before == fingerprint(lora_name=name, strength_model=0.5, cut={"cut": "rank", "rank": 2})
    os.utime(loras / name, ns=(1, 1))
    assert fingerprint(lora_name=name, strength_model=1.0) != before


def test_a_broken_file_gives_one_sentence(pack, loras, model):
    loras.mkdir()
    (loras / "empty.safetensors").touch()
    with pytest.raises(ValueError, match=r"empty\.safetensors is an empty file"):
        pack.nodes.adapter.load.ACLoRALoad.execute("empty.safetensors", model=model)


def test_the_saved_name_can_be_linked_to_the_stock_loaders(pack):
    from comfy_execution.validation import validate_node_input

    import nodes

    given = pack.nodes.adapter.save.ACLoRASave.RETURN_TYPES[0]
    assert validate_node_input(given, nodes.LoraLoader.INPUT_TYPES()["required"]["lora_name"][0])
    assert validate_node_input(given, "COMBO") and validate_node_input(given, "STRING")
