"""The formats of LoRA files: names there and back, layers that are split, and what cannot be written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.adapter.file_formats import in_comfyui_names, in_format
from aclora_core.adapter.file_size import file_size
from aclora_core.adapter.lora_file import from_state_dict, load, save_in_format
from aclora_core.adapter.metadata import build_metadata
from aclora_core.adapter.names import BASE_MODEL, base_model_of
from aclora_core.adapter.rank_report import RankReport
from aclora_core.adapter.resizing import ResizeConfig, resize
from aclora_core.adapter.state_dict import to_state_dict
from aclora_core.adapter.training_facts import TrainingFacts
from aclora_core.adapter.truncation import decompose
from tests.support.random_lora import random_lora

SDXL = "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k"
SD15 = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"
CLIP_G = "text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.q_proj"
LINEAR_1 = "diffusion_model.single_blocks.7.linear1"
MODULATION = "diffusion_model.final_layer.adaLN_modulation.1"
FLUX = {LINEAR_1: (42, 6), MODULATION: (12, 6), "diffusion_model.double_blocks.0.img_attn.qkv": (18, 6)}


def adapter_of(shapes: dict[str, tuple[int, ...]], base_model: str = "") -> Adapter:
    adapter = from_state_dict(random_lora(shapes))
    return replace(adapter, metadata={BASE_MODEL: base_model} if base_model else {})


def delta(layer: Layer) -> Tensor:
    down, up = layer.factors()
    return layer.scale * up @ down


def assert_same_change(found: Adapter, expected: Adapter) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        torch.testing.assert_close(delta(found.layers[name]), delta(layer), msg=name)


@pytest.mark.parametrize(
    ("name", "base_model", "kohya", "diffusers"),
    [
        (
            SD15,
            "SD15",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "attn1.processor.to_out",
        ),
        (SDXL, "SDXL", "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", "attn2.processor.to_k"),
        (CLIP_G, "SDXL", "lora_te2_text_model_encoder_layers_3_self_attn_q_proj", "layers.3.self_attn.q_proj"),
        (CLIP_G.replace("clip_g", "clip_l"), "SD15", "lora_te_text_model_encoder_layers_3_self_attn_q_proj", "q_proj"),
    ],
)
def test_names_are_those_of_the_formats(name, base_model, kohya, diffusers):
    adapter = adapter_of({name: (4, 6)}, base_model)
    assert list(in_format(adapter, "kohya")[0].layers) == [kohya]
    (found,) = in_format(adapter, "diffusers")[0].layers
    assert found.endswith(diffusers) and found.startswith(("unet.down_blocks.", "text_encoder"))
    assert list(in_format(adapter, "ComfyUI")[0].layers) == [name]
    for file_format in ("kohya", "diffusers"):
        assert_same_change(in_comfyui_names(in_format(adapter, file_format)[0]), adapter)


def test_a_fused_layer_is_split_by_rows_with_its_rank_kept_and_put_together_again():
    adapter = adapter_of(FLUX, "Flux")
    written, remark = in_format(adapter, "diffusers")
    assert not remark and len(written.layers) == 4 + 1 + 3
    block = "transformer.single_transformer_blocks.7."
    parts = [written.layers[block + part] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    whole = delta(adapter.layers[LINEAR_1])
    torch.testing.assert_close(torch.cat([delta(part) for part in parts]), whole)
    assert [part.lora_up.shape[0] for part in parts] == [6, 6, 6, 24]
    assert {part.rank for part in parts} == {adapter.layers[LINEAR_1].rank}
    again = in_comfyui_names(written)
    assert_same_change(again, adapter)
    assert {name: layer.rank for name, layer in again.layers.items()} == {
        name: layer.rank for name, layer in adapter.layers.items()
    }


def test_shift_and_scale_change_places_in_the_last_modulation():
    written, _ = in_format(adapter_of(FLUX, "Flux"), "diffusers")
    shift, scale = delta(adapter_of(FLUX).layers[MODULATION]).chunk(2)
    torch.testing.assert_close(delta(written.layers["transformer.norm_out.linear"]), torch.cat([scale, shift]))


def test_parts_of_another_program_are_put_together_exactly_where_their_factors_differ():
    block = "transformer.transformer_blocks.0.attn"
    state = {}
    for part, rank in (("to_q", 1), ("to_v", 2)):  # the keys are not adapted
        state[f"{block}.{part}.lora_A.weight"] = torch.randn(rank, 6)
        state[f"{block}.{part}.lora_B.weight"] = torch.randn(6, rank)
    adapter = from_state_dict(state, {"ss_base_model_version": "flux1"})
    (layer,) = in_format(adapter, "kohya")[0].layers.values()
    q, v = (
        state[f"{block}.{part}.lora_B.weight"] @ state[f"{block}.{part}.lora_A.weight"] for part in ("to_q", "to_v")
    )
    torch.testing.assert_close(delta(layer), torch.cat([q, torch.zeros(6, 6), v]))
    assert layer.rank == 3


@pytest.mark.parametrize(
    ("shapes", "base_model", "automatic"),
    [
        ({SD15: (4, 4)}, "SD15", "kohya"),
        ({SDXL: (4, 4)}, "SDXL", "kohya"),
        ({SDXL: (4, 4), CLIP_G: (4, 4)}, "", "kohya"),
        (FLUX, "Flux", "diffusers"),
        (FLUX, "HunyuanVideo", "ComfyUI"),
        (FLUX, "", "ComfyUI"),
        ({LINEAR_1: (54, 6)}, "FluxSchnell", "ComfyUI"),  # Ovis, whose MLP is gated
    ],
)
def test_the_automatic_format_follows_the_model(shapes, base_model, automatic):
    written, remark = in_format(adapter_of(shapes, base_model), "automatic")
    assert written.metadata["aclora.format"] == automatic
    assert bool(remark) == (shapes == {LINEAR_1: (54, 6)})


def test_a_file_keeps_its_format_and_that_of_another_program_its_names(tmp_path):
    path = tmp_path / "it.safetensors"
    adapter = adapter_of({SDXL: (4, 6)}, "SDXL")
    save_in_format(adapter, path, build_metadata(adapter, "it"), "diffusers")
    assert in_format(load(path), "automatic")[0].metadata["aclora.format"] == "diffusers"
    foreign = from_state_dict(random_lora({SDXL: (4, 6)}), {"ss_base_model_version": "sdxl_base_v1-0"})
    assert list(in_format(foreign, "automatic")[0].layers) == [SDXL]
    kohya = from_state_dict(random_lora({"lora_unet_output_blocks_0_1_proj_in": (4, 6)}))
    assert list(in_format(kohya, "automatic")[0].layers) == ["lora_unet_output_blocks_0_1_proj_in"]
    assert "aclora.format" not in in_format(kohya, "automatic")[0].metadata


@pytest.mark.parametrize("file_format", ["ComfyUI", "kohya", "diffusers"])
def test_a_file_of_any_format_is_read_with_the_layers_of_its_training(tmp_path, file_format):
    path = tmp_path / "it.safetensors"
    adapter = adapter_of(FLUX)
    spectrum = {name: [1.0] for name in FLUX}
    report = RankReport({}, [0.5], [], [], spectrum, dict.fromkeys(FLUX, 1), facts=TrainingFacts(base_model="Flux"))
    written, _ = save_in_format(adapter, path, build_metadata(adapter, "it", report), file_format)
    found = load(path)
    assert_same_change(found, adapter)
    assert not found.left_out and not found.remarks and found.metadata["aclora.format"] == file_format
    assert_same_change(from_state_dict(to_state_dict(found)), adapter)  # as a node hands it on
    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert metadata["ss_base_model_version"] == "flux1" and metadata["aclora.base_model"] == "Flux"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["ss_network_alpha"] == ("Dynamic" if file_format != "kohya" else metadata["ss_network_alpha"])
    if file_format == "diffusers":
        assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
        settings = json.loads(metadata["lora_adapter_metadata"])
        assert len(settings["transformer.target_modules"]) == len(written.layers)
    else:
        assert "lora_adapter_metadata" not in metadata


def test_kohyas_files_of_models_without_a_table_are_read_with_the_names_of_the_training(tmp_path):
    path = tmp_path / "it.safetensors"
    adapter = adapter_of({"diffusion_model.blocks.0.self_attn.q_norm_in": (4, 6)}, "WAN21_T2V")
    save_in_format(adapter, path, build_metadata(adapter, "it"), "kohya")
    with safe_open(path, "pt") as file:
        assert all(key.startswith("lora_unet_blocks_0_self_attn_q_norm_in.") for key in file.keys())
    assert_same_change(load(path), adapter)


def test_kohyas_files_have_one_alpha_as_some_programs_read_only_one(tmp_path):
    adapter = adapter_of({SDXL: (4, 6), SDXL.replace("to_k", "to_v"): (4, 6), CLIP_G: (6, 6)}, "SDXL")
    assert len({layer.alpha for layer in adapter.layers.values()}) > 1
    written, _ = in_format(adapter, "kohya")
    assert len({layer.alpha for layer in written.layers.values()}) == 1
    assert_same_change(in_comfyui_names(written), adapter)


def test_what_has_no_name_is_refused_with_the_layer_and_nothing_is_written(tmp_path):
    path = tmp_path / "it.safetensors"
    adapter = adapter_of({"diffusion_model.blocks.0.ffn.0": (4, 6)}, "WAN21_T2V")
    with pytest.raises(
        ValueError, match=r"'diffusion_model\.blocks\.0\.ffn\.0' of WAN21_T2V has no name in the format diff"
    ):
        save_in_format(adapter, path, build_metadata(adapter, "it"), "diffusers")
    with pytest.raises(ValueError, match="of an unknown model: connect the rank_report"):
        save_in_format(adapter_of(FLUX), path, {}, "diffusers")
    assert not path.exists()


def test_layers_of_other_kinds_are_renamed_and_refused_where_diffusers_cannot_read_them():
    dora = {**random_lora({SDXL: (4, 6)}), f"{SDXL}.dora_scale": torch.ones(4, 1)}
    adapter = from_state_dict(dora, {BASE_MODEL: "SDXL"})
    written, _ = in_format(adapter, "kohya")
    (base,) = written.other
    assert base.startswith("lora_unet_") and f"{base}.dora_scale" in written.extra
    assert in_comfyui_names(written).extra.keys() == adapter.extra.keys()
    with pytest.raises(ValueError, match="is not a plain LoRA, and files for diffusers hold nothing else"):
        in_format(adapter, "diffusers")


def test_a_layer_that_changes_nothing_and_has_no_name_is_left_out():
    projection = "text_encoders.clip_h.transformer.text_projection"
    adapter = adapter_of({SD15: (4, 4), projection: (4, 4)}, "SD20")
    with pytest.raises(ValueError, match="text_projection"):
        in_format(adapter, "kohya")
    silent = replace(adapter.layers[projection], lora_up=torch.zeros_like(adapter.layers[projection].lora_up))
    written, _ = in_format(replace(adapter, layers={**adapter.layers, projection: silent}), "kohya")
    assert len(written.layers) == 1


@pytest.mark.parametrize("base_model", ["SDXL", "Flux", "WAN21_T2V"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_size_is_known_before_the_file_is_written(tmp_path: Path, base_model, dtype):
    path = tmp_path / "it.safetensors"
    adapter = adapter_of({SDXL: (40, 60), CLIP_G: (6, 6)} if base_model == "SDXL" else FLUX, base_model)
    metadata = build_metadata(adapter, "it")
    save_in_format(adapter, path, metadata, dtype=dtype)
    assert file_size(adapter, metadata, dtype) == path.stat().st_size


@pytest.mark.parametrize(
    ("metadata", "names", "expected"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, [], "SDXL"),
        ({"ss_base_model_version": "sd_1.5"}, [], "SD15"),
        ({"ss_base_model_version": "flux1"}, [], "Flux"),
        ({"ss_base_model_version": "flux2"}, [], ""),
        ({"aclora.settings": '{"base_model": "ZImage"}'}, [], "ZImage"),
        ({"aclora.settings": "["}, ["lora_unet_input_blocks_7_1_transformer_blocks_4_ff_net_2"], "SDXL"),
        ({}, ["lora_unet_down_blocks_0_attentions_1_proj_in"], "SD15"),
        ({}, ["diffusion_model.joint_blocks.0.x_block.attn.qkv", CLIP_G], "SD3"),
        ({}, ["diffusion_model.double_blocks.0.img_attn.qkv"], ""),
    ],
)
def test_the_model_is_found_by_the_metadata_and_else_by_the_names(metadata, names, expected):
    assert base_model_of(metadata, names) == expected


def test_metadata_that_lies_about_a_file_hides_none_of_its_layers():
    block = "transformer.transformer_blocks.0.attn"
    state = random_lora(
        {
            f"{block}.to_q": (6, 6),
            f"{block}.to_k": (5, 7),
            "diffusion_model.img_in": (6, 4),
            "transformer.x_embedder": (6, 4),
        }
    )
    metadata = {"aclora.format": "diffusers", "aclora.base_model": "Flux", "aclora.names": '["x", 1]'}
    adapter = from_state_dict(state, metadata)
    assert {f"{name}.alpha" for name in adapter.layers} == {key for key in state if key.endswith(".alpha")}


def test_a_lora_truncated_to_a_size_has_it_though_its_layers_are_split(tmp_path):
    shapes = {f"diffusion_model.single_blocks.{number}.linear1": (420, 60) for number in range(6)}
    adapter = adapter_of(shapes, "Flux")
    size = 23_000
    config = ResizeConfig("file size", size / 1e6, dtype=torch.float16)
    truncated, _ = resize(adapter, decompose(adapter), config)
    path = tmp_path / "small.safetensors"
    written, _ = save_in_format(truncated, path, build_metadata(truncated, "small"), dtype=torch.float16)
    component = 2 * (4 * 60 + 420)
    assert written.metadata["aclora.format"] == "diffusers" and truncated.layers
    assert size - component - 600 < path.stat().st_size <= size
