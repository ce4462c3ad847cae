"""Target layers: presets on the layer names of model families, name patterns, text encoders."""

import logging
from collections.abc import Sequence

import pytest
from torch import nn

from aclora_core.config.layer_patterns import select_layers
from aclora_core.lora.targets import alpha_scales, preset_layers, target_layers
from tests.support.toy import Toy, toy


def tree(names: Sequence[str]) -> nn.Module:
    """A module tree with a Linear under each of these dotted names."""
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, nn.Linear(2, 2))
    return root


UNET, JOINT, BLOCK = "input_blocks.1.1.transformer_blocks.0", "joint_blocks.0.x_block", "transformer_blocks.0"


# For each family of models as ComfyUI names its layers: attention, feed-forward, neither.
FAMILIES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "SD1.5 and SDXL": (
        [f"{UNET}.{part}" for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k")]
        + ["middle_block.1.transformer_blocks.0.attn2.to_out.0", "output_blocks.5.1.transformer_blocks.1.attn1.to_v"],
        [f"{UNET}.ff.net.0.proj", f"{UNET}.ff.net.2", "output_blocks.5.1.transformer_blocks.1.ff.net.2"],
        ["time_embed.0", "label_emb.0.0", "input_blocks.1.0.emb_layers.1", "input_blocks.1.1.proj_in"],
    ),
    "SD3": (
        [f"{JOINT}.attn.qkv", f"{JOINT}.attn.proj", "joint_blocks.0.context_block.attn.qkv", f"{JOINT}.attn2.qkv"],
        [f"{JOINT}.mlp.fc1", f"{JOINT}.mlp.fc2", "joint_blocks.0.context_block.mlp.fc1"],
        [f"{JOINT}.adaLN_modulation.1", "context_embedder", "final_layer.linear"],
    ),
    "Flux": (
        [f"double_blocks.0.{part}" for part in ("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj")]
        + ["single_blocks.0.linear1", "single_blocks.0.linear2"],
        [f"double_blocks.0.{part}" for part in ("img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2")],
        ["img_in", "time_in.in_layer", "vector_in.out_layer", "double_blocks.0.img_mod.lin", "final_layer.linear"],
    ),
    "Wan": (
        [f"blocks.0.{part}" for part in ("self_attn.q", "self_attn.o", "cross_attn.v", "cross_attn.k_img")],
        ["blocks.0.ffn.0", "blocks.0.ffn.2"],
        ["text_embedding.0", "time_projection.1", "head.head"],
    ),
    "Lumina and Z-Image": (
        ["layers.0.attention.qkv", "layers.0.attention.out", "context_refiner.1.attention.qkv"],
        ["layers.0.feed_forward.w1", "layers.0.feed_forward.w2", "noise_refiner.0.feed_forward.w3"],
        ["layers.0.adaLN_modulation.1", "cap_embedder.1", "x_embedder", "final_layer.linear"],
    ),
    "Cosmos": (
        ["blocks.0.self_attn.q_proj", "blocks.0.cross_attn.output_proj"],
        ["blocks.0.mlp.layer1", "blocks.0.mlp.layer2"],
        ["blocks.0.adaln_modulation_self_attn.1", "blocks.0.adaln_modulation_mlp.2", "t_embedder.1.linear_1"],
    ),
    "HunyuanDiT": (
        ["blocks.0.attn1.Wqkv", "blocks.0.attn2.kv_proj"],
        ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"],
        ["mlp_t5.0", "t_embedder.mlp.0", "blocks.0.default_modulation.1", "blocks.0.skip_linear"],
    ),
    "AuraFlow": (
        ["double_layers.0.attn.w1q", "single_layers.0.attn.w1o"],
        ["double_layers.0.mlpC.c_fc1", "double_layers.0.mlpX.c_proj", "single_layers.0.mlp.c_fc2"],
        ["double_layers.0.modC.1", "t_embedder.mlp.0", "cond_seq_linear"],
    ),
    "Stable Cascade": (
        ["down_blocks.0.2.attention.attn.to_q", "up_blocks.1.5.attention.attn.to_out.0"],
        ["down_blocks.0.0.channelwise.0", "down_blocks.0.0.channelwise.4"],
        ["clip_txt_mapper", "down_blocks.0.1.mapper"],
    ),
    "Qwen": (
        [f"{BLOCK}.attn.{part}" for part in ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "to_add_out")],
        [f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.img_mlp.net.2", f"{BLOCK}.txt_mlp.net.0.proj"],
        [f"{BLOCK}.img_mod.1", "img_in", "txt_in", "norm_out.linear", "proj_out"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_select_the_right_layers_of_each_model_family(family: str) -> None:
    attention, feed_forward, others = FAMILIES[family]
    model = tree([*attention, *feed_forward, *others])
    assert set(preset_layers(model, "attention")) == set(attention)
    assert set(preset_layers(model, "attention and feed-forward")) == {*attention, *feed_forward}
    assert set(preset_layers(model, "all")) == {*attention, *feed_forward, *others}


def test_names_get_the_prefix_and_map_to_their_modules() -> None:
    model = tree(["blocks.0.self_attn.q", "head"])
    found = preset_layers(model, "attention", "diffusion_model.")
    assert list(found) == ["diffusion_model.blocks.0.self_attn.q"]
    assert found["diffusion_model.blocks.0.self_attn.q"] is model.get_submodule("blocks.0.self_attn.q")


def test_all_linear_layers_are_trained_and_logged_if_no_name_matches(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    with caplog.at_level(logging.INFO, logger="aclora"):
        assert list(preset_layers(model, "attention")) == ["0", "2"]
    assert "'attention'" in caplog.text


def test_preset_all_includes_plain_convolutions_only() -> None:
    kinds: dict[str, nn.Module] = {
        "plain": nn.Conv2d(4, 4, 3, padding=1),
        "video": nn.Conv3d(4, 4, 3),
        "grouped": nn.Conv2d(4, 4, 3, groups=2),
        "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "transposed": nn.ConvTranspose2d(4, 4, 3),
        "norm": nn.LayerNorm(4),
    }
    assert set(preset_layers(nn.ModuleDict(kinds), "all")) == {"plain", "video"}


def test_patterns_select_among_the_layers_of_a_preset() -> None:
    attention, feed_forward, others = FAMILIES["Flux"]
    model = tree([*attention, *feed_forward, *others])
    found = select_layers(
        preset_layers(model, "attention", "diffusion_model."), "img_attn\ntxt_attn.proj", "img_attn.proj"
    )
    assert list(found) == [f"diffusion_model.double_blocks.0.{part}" for part in ("img_attn.qkv", "txt_attn.proj")]
    with pytest.raises(ValueError, match="'img_mlp'"):
        select_layers(preset_layers(model, "attention", "diffusion_model."), "img_mlp", "")
    assert len(select_layers(preset_layers(model, "attention and feed-forward"), "img_mlp", "")) == 2


def model_with_text_encoder() -> Toy:
    model = toy(1, text_encoders={"text.": tree(["self_attn.q"])})
    model.network = tree(["attn.q", "ff.0"])
    return model


def test_text_encoders_are_targets_only_if_they_are_trained() -> None:
    model = model_with_text_encoder()
    assert list(target_layers(model, "attention", "", "", False)) == ["toy.attn.q"]
    assert list(target_layers(model, "attention", "", "", True)) == ["toy.attn.q", "text.self_attn.q"]


def test_include_and_exclude_apply_to_text_encoders_too() -> None:
    model = model_with_text_encoder()
    assert list(target_layers(model, "all", "q", "toy.", True)) == ["text.self_attn.q"]


def test_training_a_missing_text_encoder_is_rejected() -> None:
    with pytest.raises(ValueError, match="there is none"):
        target_layers(toy(1), "attention", "", "", True)


def test_a_model_without_linear_layers_is_rejected() -> None:
    model = toy(1)
    model.network = nn.ModuleDict({"attn": nn.LayerNorm(4)})
    with pytest.raises(ValueError, match="no linear layer"):
        target_layers(model, "all", "", "", False)


def test_alpha_is_scaled_in_text_encoders_only() -> None:
    assert alpha_scales(["toy.attn", "text.self_attn.q"], ["text."], 0.5) == {"text.self_attn.q": 0.5}
    assert alpha_scales(["toy.attn"], [], 0.0) == {}
