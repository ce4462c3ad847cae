"""LoRA files in every key format that ComfyUI reads."""

import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclora_core.adapter.adapter import Adapter, Layer, with_dtype
from aclora_core.adapter.key_formats import KEY_FORMATS
from aclora_core.adapter.left_out import left_out_lines
from aclora_core.adapter.lora_file import from_state_dict, load, save
from aclora_core.adapter.metadata import build_metadata
from aclora_core.adapter.state_dict import to_state_dict
from aclora_core.storage.safetensors_file import write_safetensors

BASES = (
    "diffusion_model.joint_blocks.0.x_block.attn.qkv",
    "lora_unet_input_blocks_4_1_proj_in",
    "transformer.single_transformer_blocks.3.attn.to_q",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
)


def matrices(rank=4, out=6, inner=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator)


def plain(base="diffusion_model.a", alpha=2.0, rank=4):
    up, down = matrices(rank)
    return {f"{base}.lora_up.weight": up, f"{base}.lora_down.weight": down, f"{base}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pair", KEY_FORMATS, ids=lambda pair: pair[0])
def test_every_suffix_style_is_read_under_every_prefix(pair, base):
    up, down = matrices()
    adapter = from_state_dict({base + pair[0]: up, base + pair[1]: down, base + ".alpha": torch.tensor(2.0)})
    assert adapter.layers.keys() == {base} and not adapter.other
    layer = adapter.layers[base]
    assert torch.equal(layer.lora_up, up) and torch.equal(layer.lora_down, down)
    assert (layer.rank, layer.alpha, layer.scale) == (4, 2.0, 0.5)


def test_without_an_alpha_the_scale_is_one():
    up, down = matrices(rank=3)
    layer = from_state_dict({"a.lora_B.weight": up, "a.lora_A.weight": down}).layers["a"]
    assert layer.scale == 1.0


def test_a_convolution_is_flattened_to_two_dimensions():
    layer = Layer(torch.ones(2, 3, 5, 7, dtype=torch.float16), torch.ones(4, 2, 1, 1, dtype=torch.float16), 2.0)
    down, up = layer.factors()
    assert (down.shape, up.shape) == ((2, 105), (4, 2))
    assert down.dtype == up.dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 5),
    alpha=st.floats(-100, 100, width=32),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
    convolution=st.booleans(),
)
def test_a_saved_adapter_comes_back_the_same(tmp_path_factory, rank, alpha, dtype, convolution):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    up, down = (matrix.to(dtype) for matrix in matrices(rank, 4, 6, seed=rank))
    if convolution:
        up, down = up.reshape(4, rank, 1, 1), down.reshape(rank, 6, 1, 1)
    save(Adapter({"diffusion_model.a": Layer(down, up, alpha)}), path, {"title": "ink"})
    adapter = load(path)
    layer = adapter.layers["diffusion_model.a"]
    assert layer.lora_up.dtype == dtype and layer.alpha == alpha and adapter.metadata["title"] == "ink"
    assert torch.equal(layer.lora_up.float(), up.float()) and torch.equal(layer.lora_down.float(), down.float())


def test_every_style_is_written_in_the_style_of_the_host():
    up, down = matrices()
    written = to_state_dict(from_state_dict({"a.lora_B": up, "a.lora_A": down.T.contiguous().T}))
    assert written.keys() == {"a.lora_up.weight", "a.lora_down.weight", "a.alpha"}
    assert written["a.alpha"].dtype == torch.float32 and written["a.alpha"].item() == 4.0
    assert all(tensor.is_contiguous() for tensor in written.values())


ONES = torch.ones(2, 2)
FOREIGN = {
    "LoKr": {"a.lokr_w1": ONES, "a.lokr_w2_a": ONES, "a.lokr_w2_b": ONES, "a.alpha": torch.tensor(1.0)},
    "LoHa": {"a.hada_w1_a": ONES, "a.hada_w1_b": ONES, "a.hada_w2_a": ONES, "a.hada_w2_b": ONES},
    "GLoRA": {"a.a1.weight": ONES, "a.a2.weight": ONES, "a.b1.weight": ONES, "a.b2.weight": ONES},
    "OFT": {"a.oft_blocks": torch.ones(2, 2, 2), "a.alpha": torch.tensor(1.0)},
    "BOFT": {"a.oft_blocks": torch.ones(2, 2, 2, 2), "a.rescale": ONES},
    "DoRA": {**plain("a"), "a.dora_scale": torch.ones(6, 1)},
    "DoRA, LoKr": {"a.lokr_w1": ONES, "a.lokr_w2": ONES, "a.dora_scale": ONES},
    "Tucker LoRA": {**plain("a"), "a.lora_mid.weight": torch.ones(4, 4, 3, 3)},
    "full difference": {"a.diff": ONES},
    "bias difference, full difference": {"a.diff": ONES, "a.diff_b": torch.ones(2)},
    "replaced weight": {"a.set_weight": ONES},
    "norm difference": {"a.w_norm": ONES, "a.b_norm": ONES},
    "LoRA on a reshaped weight": {**plain("a"), "a.reshape_weight": torch.tensor([6, 9])},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_layers_of_other_kinds_are_named_and_kept(kind):
    adapter = from_state_dict(FOREIGN[kind])
    assert not adapter.layers and adapter.other == {"a": kind}
    written = to_state_dict(adapter)
    assert written.keys() == FOREIGN[kind].keys()
    assert all(torch.equal(written[key], FOREIGN[kind][key]) for key in written)


def test_the_magnitudes_of_peft_make_a_layer_a_dora():
    up, down = matrices()
    keys = {"a.lora_B.weight": up, "a.lora_A.weight": down, "a.lora_magnitude_vector": torch.ones(6)}
    adapter = from_state_dict(keys)
    assert adapter.other == {"a": "DoRA of PEFT"}
    assert adapter.left_out["a.lora_magnitude_vector"].startswith("DoRA magnitudes as PEFT stores them, without which")
    assert to_state_dict(adapter).keys() == keys.keys()


def test_a_bias_difference_stands_beside_its_lora():
    adapter = from_state_dict({**plain("a"), "a.diff_b": torch.ones(6)})
    assert adapter.layers.keys() == {"a"} and adapter.other == {"a": "bias difference"}
    assert to_state_dict(adapter).keys() == {*plain("a"), "a.diff_b"}


def test_a_key_of_no_known_kind_is_kept_under_its_own_name():
    adapter = from_state_dict({**plain(), "bundle_emb.ink.string_to_param.*": ONES})
    assert not adapter.other and "models/embeddings" in adapter.left_out["bundle_emb.ink.string_to_param.*"]
    assert "bundle_emb.ink.string_to_param.*" in to_state_dict(adapter)


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({}, "There is no LoRA in it: 0 tensors"),
        ({"model.weight": ONES}, "There is no LoRA in it: 1 tensors; its first key is 'model.weight'"),
        (without(plain("x"), "x.lora_down.weight"), r"'x.lora_down.weight' is missing beside 'x.lora_up.weight'"),
        (without(plain("x"), "x.lora_up.weight"), r"'x.lora_up.weight' is missing beside 'x.lora_down.weight'"),
        ({"x.lora_A.weight": ONES}, r"'x.lora_B.weight' is missing beside 'x.lora_A.weight'"),
        ({"x.alpha": torch.tensor(1.0)}, r"'x.alpha' has no lora_up and lora_down beside it"),
        ({"x.dora_scale": ONES}, r"'x.dora_scale' has no lora_up and lora_down beside it"),
        (without(FOREIGN["LoKr"], "a.lokr_w1"), r"'a.lokr_w1' is missing from the LoKr layer"),
        (without(FOREIGN["LoKr"], "a.lokr_w2_b"), r"'a.lokr_w2_b' is missing from the LoKr layer"),
        (without(FOREIGN["LoHa"], "a.hada_w1_b"), r"'a.hada_w1_b' is missing from the LoHa layer"),
        (without(FOREIGN["GLoRA"], "a.b2.weight"), r"'a.b2.weight' is missing from the GLoRA layer"),
        (without(FOREIGN["BOFT"], "a.oft_blocks"), r"'a.oft_blocks' is missing from the OFT layer"),
        ({**plain("x"), "x.alpha": torch.ones(2)}, r"'x.alpha' must be one number, but has the shape \(2,\)"),
        ({**plain("x"), "x.alpha": torch.tensor(torch.nan)}, r"'x.alpha' holds NaN"),
        ({**plain("x"), "x.lora_up.weight": torch.full((6, 4), torch.inf)}, "'x.lora_up.weight' holds NaN"),
        ({**plain("x"), "x.lora_up.weight": torch.ones(6, 3)}, r"Layer 'x': lora_up \(6, 3\) and lora_down \(4, 5\)"),
        ({**plain("x"), "x.lora_up.weight": torch.ones(6)}, r"Layer 'x': lora_up \(6,\) and lora_down \(4, 5\)"),
        ({**plain("x"), "x.lora_down.weight": torch.tensor(1.0)}, r"Layer 'x'"),
        ({**plain("x", rank=0)}, r"Layer 'x': lora_up \(6, 0\) and lora_down \(0, 5\)"),
        ({**plain("x"), "x.lora_up.weight": torch.ones(6, 4, dtype=torch.int8)}, "Layer 'x' holds torch.int8"),
    ],
)
def test_a_broken_lora_is_refused_with_the_key_in_the_sentence(state, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_state_dict(state)


PEFT = {"x.lora_B.weight": ONES, "x.lora_A.weight": ONES}


@pytest.mark.parametrize(
    ("beside", "left_out"),
    [
        ({"x.alpha": torch.tensor(1.0)}, {"x": "alpha without matrices"}),
        ({"x.dora_scale": ONES}, {"x": "part of a layer without matrices"}),
        ({"x.lora_up.weight": ONES}, {"x": "half a pair"}),
        ({"x.lora_down.weight": ONES, "x.alpha": torch.tensor(1.0)}, {"x": "half a pair"}),
        ({"x.lora_up.weight": ONES, "x.lora_A.weight": ONES}, {"x": "half a pair"}),
        (plain("x", rank=0), {"x": "layer of rank 0"}),
        ({**plain("x"), "x.lora_up.weight": torch.ones(6, 3)}, {"x": "layer whose lora_up and lora_down do not fit"}),
        ({**plain("x"), "x.alpha": torch.ones(2)}, {"x": "layer whose alpha is not one number"}),
        ({key: tensor.int() for key, tensor in plain("x").items()}, {"x": "layer whose type is not floating"}),
        (without(FOREIGN["LoKr"], "a.lokr_w1"), {"a": "incomplete layer of the kind LoKr"}),
    ],
)
def test_a_layer_that_cannot_be_used_does_not_refuse_the_others(beside, left_out):
    adapter = from_state_dict({**plain("whole"), **beside})
    assert adapter.layers.keys() == {"whole"} and not adapter.other
    assert adapter.left_out.keys() == left_out.keys()
    assert all(adapter.left_out[name].startswith(reason) for name, reason in left_out.items())
    assert to_state_dict(adapter).keys() == plain("whole").keys()


def test_of_two_spellings_of_a_layer_the_first_of_the_host_is_read():
    adapter = from_state_dict({**plain("x"), **PEFT})
    assert torch.equal(adapter.layers["x"].lora_up, plain("x")["x.lora_up.weight"])
    assert adapter.left_out == dict.fromkeys(PEFT, "duplicate of a layer under another name")


def test_half_a_pair_in_the_first_spelling_leaves_the_second():
    adapter = from_state_dict({**PEFT, "x.lora_up.weight": torch.ones(6, 4)})
    assert torch.equal(adapter.layers["x"].lora_up, ONES)
    assert adapter.left_out.keys() == {"x.lora_up.weight"}


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_the_name_of_an_adapter_in_the_keys_is_read_over(ending):
    keys = {f"x.lora_B.ink{ending}": ONES, f"x.lora_A.ink{ending}": ONES, f"x.lora_magnitude_vector.ink{ending}": ONES}
    assert from_state_dict(keys).other == {"x": "DoRA of PEFT"}
    assert from_state_dict(dict(list(keys.items())[:2])).layers.keys() == {"x"}


def test_of_several_adapters_in_a_file_the_default_one_is_read():
    keys = {
        f"x.lora_{side}.{name}.weight": ONES * number for side in "AB" for number, name in enumerate(["a", "default"])
    }
    adapter = from_state_dict(keys)
    assert torch.equal(adapter.layers["x"].lora_up, ONES)
    assert adapter.left_out == dict.fromkeys(
        ["x.lora_A.a.weight", "x.lora_B.a.weight"], "layer of another LoRA in the same file"
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("a.lora_B.bias", "bias of a LoRA's matrix"),
        ("a.lora_B.ink.bias", "bias of a LoRA's matrix"),
        ("a.scalar", "scalar of a layer"),
        ("elsewhere", "key that ComfyUI does not know"),
    ],
)
def test_keys_that_the_host_does_not_use_are_named_and_kept(key, words):
    adapter = from_state_dict({**plain("a"), key: ONES})
    assert adapter.left_out.keys() == {key} and words in adapter.left_out[key]
    assert adapter.layers.keys() == {"a"} and key in to_state_dict(adapter)


def test_a_line_for_each_reason_has_the_number_and_the_first_name():
    found = {"a": "half", "b": "half", "c": "stray"}
    assert left_out_lines(found) == ["2 x half: 'a' and 1 more", "1 x stray: 'c'"]


def test_a_flat_dora_scale_is_read_as_a_number_for_each_output():
    adapter = from_state_dict({**plain("a"), "a.dora_scale": torch.arange(6.0)})
    assert torch.equal(adapter.extra["a.dora_scale"], torch.arange(6.0).reshape(6, 1))
    assert "DoRA scale of 1 layer has one dimension" in adapter.remarks[0]


def test_a_flipped_bit_in_a_file_of_this_package_is_found(tmp_path):
    adapter = from_state_dict(plain("a"))
    path = tmp_path / "ink.safetensors"
    save(adapter, path, build_metadata(adapter, "ink"))
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=r"^ink\.safetensors is damaged: its numbers do not match the SHA-256"):
        load(path)


def test_a_file_of_another_program_that_is_not_as_its_hash_gets_a_remark(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", plain("a"), {})
    assert not load(tmp_path / "x.safetensors").remarks
    safetensors.torch.save_file(plain("a"), tmp_path / "y.safetensors", {"sshs_model_hash": "0" * 64})
    assert "do not match the SHA-256 in its header" in load(tmp_path / "y.safetensors").remarks[0]


def test_half_files_of_saves_that_were_killed_are_deleted(tmp_path):
    half, alive = tmp_path / ".ink.safetensors.1-ab.partial", tmp_path / ".new.safetensors.1-cd.partial"
    for path in (half, alive):
        path.write_bytes(b"half")
    os.utime(half, (1, 1))
    save(from_state_dict(plain("a")), tmp_path / "ink.safetensors", {})
    assert sorted(os.listdir(tmp_path)) == [alive.name, "ink.safetensors"]


def test_the_metadata_travels_with_the_tensors():
    state = to_state_dict(from_state_dict(plain("a"), {"modelspec.author": "somebody"}))
    assert from_state_dict(state).metadata == {"modelspec.author": "somebody"}
    assert from_state_dict(dict(state)).metadata == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_among_many_is_found(value, dtype):
    state = plain("x", rank=64)
    state["x.lora_down.weight"] = state["x.lora_down.weight"].to(dtype)
    state["x.lora_down.weight"][37, 3] = value
    with pytest.raises(ValueError, match=r"'x\.lora_down\.weight' holds NaN or infinity"):
        from_state_dict(state)


def test_nan_is_found_in_eight_bit_weights_too():
    up = torch.tensor([[float("nan")]]).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="holds NaN"):
        from_state_dict({"a.lora_up.weight": up, "a.lora_down.weight": torch.ones(1, 1)})


def test_the_file_is_named_in_front_of_the_key(tmp_path):
    write_safetensors(tmp_path / "half.safetensors", {"x.lora_A.weight": ONES}, {})
    with pytest.raises(ValueError, match=r"half\.safetensors: 'x\.lora_B\.weight' is missing"):
        load(tmp_path / "half.safetensors")


def test_nothing_is_written_for_an_empty_or_a_spoilt_adapter(tmp_path):
    spoilt = Adapter({"a": Layer(torch.full((1, 2), torch.nan), torch.ones(2, 1), 1.0)})
    for adapter, sentence in ((Adapter({}), "nothing to save"), (spoilt, "'a.lora_down.weight' holds NaN")):
        with pytest.raises(ValueError, match=sentence):
            save(adapter, tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_change_of_type_leaves_alpha_and_the_first_adapter_alone():
    adapter = from_state_dict({**plain("a", alpha=3.3), **plain("b"), "b.reshape_weight": torch.tensor([6, 9])})
    half = with_dtype(adapter, torch.float16)
    assert half.layers["a"].lora_up.dtype == torch.float16 and adapter.layers["a"].lora_up.dtype == torch.float32
    assert half.layers["a"].alpha == adapter.layers["a"].alpha
    assert half.extra["b.lora_up.weight"].dtype == torch.float16
    assert half.extra["b.alpha"].dtype == torch.float32 and half.extra["b.reshape_weight"].dtype == torch.int64


def test_a_value_too_large_for_the_type_is_refused():
    adapter = Adapter({"wide": Layer(torch.full((1, 2), 1e5), torch.ones(2, 1), 1.0)})
    with pytest.raises(ValueError, match=r"Layer 'wide' does not fit into torch.float16"):
        with_dtype(adapter, torch.float16)
    assert with_dtype(adapter, torch.bfloat16).layers["wide"].lora_down.dtype == torch.bfloat16


def test_the_releases_with_their_own_spelling_get_the_names_of_the_host():
    up, down = matrices()
    control = {
        "img_in.lora_B.weight": up,
        "img_in.lora_A.weight": down,
        "img_in.lora_B.bias": torch.ones(6),
        "single_blocks.0.norm.key_norm.scale": torch.ones(5),
    }
    assert from_state_dict(control).other == {
        "diffusion_model.img_in": "LoRA on a reshaped weight, bias difference",
        "diffusion_model.single_blocks.0.norm.key_norm": "replaced weight",
    }
    key = "lora_unet__blocks_0_cross_attn_k"
    fun = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    assert from_state_dict(fun).layers.keys() == {"lora_unet_blocks_0_cross_attn_k"}
    uso = {
        "single_blocks.37.processor.qkv_lora.up.weight": up,
        "single_blocks.37.processor.qkv_lora.down.weight": down,
        "double_blocks.18.processor.qkv_lora2.up.weight": up,
        "double_blocks.18.processor.qkv_lora2.down.weight": down,
    }
    names = {"diffusion_model.single_blocks.37.linear1_qkv", "diffusion_model.double_blocks.18.txt_attn.qkv"}
    assert from_state_dict(uso).layers.keys() == names


def test_the_dict_of_the_host_is_not_changed():
    state = plain()
    before = {key: tensor.clone() for key, tensor in state.items()}
    with_dtype(from_state_dict(state), torch.float16)
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in state)
