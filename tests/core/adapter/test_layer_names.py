"""Parsed layer names, in the spellings of all key formats."""

import pytest

from aclora_core.adapter.layer_names import LayerName, block_kind, layer_sort_key, parse_layer_name


@pytest.mark.parametrize(
    ("name", "prefix", "block", "module"),
    [
        ("diffusion_model.joint_blocks.10.x_block.attn.qkv", "diffusion_model.", "joint_blocks.10", "x_block.attn.qkv"),
        (
            "diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1",
            "diffusion_model.",
            "joint_blocks.0",
            "context_block.adaLN_modulation.1",
        ),
        ("diffusion_model.double_blocks.3.img_mlp.0", "diffusion_model.", "double_blocks.3", "img_mlp.0"),
        ("diffusion_model.input_blocks.1.0.in_layers.2", "diffusion_model.", "input_blocks.1", "in_layers.2"),
        ("diffusion_model.input_blocks.0.0", "diffusion_model.", "input_blocks.0", "0"),
        (
            "diffusion_model.input_blocks.7.1.transformer_blocks.9.ff.net.0.proj",
            "diffusion_model.",
            "input_blocks.7.9",
            "ff.net.0.proj",
        ),
        ("lora_unet_input_blocks_7_1_transformer_blocks_9_ff_net_2", "lora_unet_", "input_blocks.7.9", "ff_net.2"),
        ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_", "input_blocks.4", "proj_in"),
        (
            "lora_unet_down_blocks_1_attentions_1_transformer_blocks_3_attn1_to_out_0",
            "lora_unet_",
            "down_blocks.1.1.3",
            "attn1_to_out.0",
        ),
        ("unet.down_blocks.0.downsamplers.0.conv", "unet.", "down_blocks.0", "conv"),
        ("unet.mid_block.attentions.0.proj_in", "unet.", "mid_block.attentions.0", "proj_in"),
        ("transformer.single_transformer_blocks.3.proj_out", "transformer.", "single_transformer_blocks.3", "proj_out"),
        ("diffusion_model.layers.3.attention.qkv", "diffusion_model.", "layers.3", "attention.qkv"),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", "lora_te1_", "te1 layers.11", "mlp_fc1"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            "text_encoders.clip_l.transformer.",
            "clip_l layers.0",
            "mlp.fc1",
        ),
        ("diffusion_model.x_embedder.proj", "diffusion_model.", "", "x_embedder.proj"),
        ("diffusion_model.time_embed.0", "diffusion_model.", "", "time_embed.0"),
        ("lora_te2_text_projection", "lora_te2_", "", "text_projection"),
        ("blocks.7", "", "blocks.7", "7"),
        ("anything", "", "", "anything"),
    ],
)
def test_the_place_of_a_layer(name, prefix, block, module):
    assert parse_layer_name(name) == LayerName(prefix, block, module)


def test_a_text_encoder_has_its_own_name():
    assert parse_layer_name("text_encoder_2.text_model.encoder.layers.5.mlp.fc1").text_encoder == "text_encoder_2"
    assert parse_layer_name("lora_te_text_model_encoder_layers_0_mlp_fc1").text_encoder == "te"
    assert parse_layer_name("diffusion_model.joint_blocks.0.x_block.attn.qkv").text_encoder == ""


def test_the_order_is_that_of_the_model():
    names = [
        "diffusion_model.input_blocks.1.1.proj_in",
        "diffusion_model.input_blocks.2.1.transformer_blocks.1.attn1.to_q",
        "diffusion_model.input_blocks.2.1.transformer_blocks.10.attn1.to_q",
        "diffusion_model.input_blocks.10.1.proj_in",
        "diffusion_model.middle_block.1.proj_in",
        "diffusion_model.output_blocks.0.1.proj_in",
        "diffusion_model.out.2",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.2.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc1",
    ]
    assert sorted(reversed(names), key=layer_sort_key) == names


def test_block_kind_drops_all_numbers():
    assert block_kind("input_blocks.7.9") == "input_blocks" and block_kind("te1 layers.11") == "te1 layers"
