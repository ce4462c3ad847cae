"""Alphas that a LoRA file has in its header in place of tensors."""

import json
import math
import re

import pytest
import torch

from aclora_core.adapter import header_alpha
from aclora_core.adapter.lora_file import from_state_dict

NAME = "diffusion_model.blocks.0.attn.to_q"


def layer(metadata, spelling=("lora_B", "lora_A"), base=NAME, rank=4, **more):
    """The layer of a file, and the remarks on it."""
    up, down = spelling
    state = {f"{base}.{up}.weight": torch.ones(6, rank), f"{base}.{down}.weight": torch.ones(rank, 5), **more}
    adapter = from_state_dict(state, metadata)
    return adapter.layers[base], adapter.remarks


def peft(**settings):
    return {"lora_adapter_metadata": json.dumps(settings)}


def component(name, **settings):
    return peft(**{f"{name}.{key}": value for key, value in settings.items()})


@pytest.mark.parametrize("name", ["transformer", "unet"])
def test_the_alpha_of_diffusers_counts(name):
    found, remarks = layer(component(name, r=4, lora_alpha=1))
    assert (found.alpha, found.scale) == (1.0, 0.25)
    assert remarks == ("The alpha of 1 layer is that in the file's header, which gives the scale 0.25.",)


def test_settings_without_a_component_count():
    assert layer(peft(r=4, lora_alpha=2))[0].scale == 0.5


def test_each_text_encoder_has_settings_of_its_own():
    settings = {"transformer.lora_alpha": 4, "text_encoder.lora_alpha": 8, "text_encoder_2.lora_alpha": 2}
    for base, alpha in {
        "text_encoder.text_model.layers.0": 8,
        "text_encoder_2.text_model.layers.0": 2,
        "lora_te1_text_model_layers_0": 8,
        "lora_te2_text_model_layers_0": 2,
        "transformer.layers.0": 4,
    }.items():
        assert layer(peft(**settings), base=base)[0].alpha == alpha
    assert layer(component("transformer", lora_alpha=2), base="text_encoder.layers.0")[0].scale == 1.0


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [("to_q", 8), ("blocks.0.attn.to_q", 8), ("attn.to_k", 2), ("o_q", 2), ("blocks.[0-3].attn.to_q", 8), ("(", 2)],
)
def test_an_alpha_of_some_layers_is_found_by_the_end_of_their_names(pattern, alpha):
    settings = component("transformer", r=4, lora_alpha=2, alpha_pattern={pattern: 8})
    assert layer(settings)[0].alpha == alpha


def test_rank_stabilised_loras_are_scaled_by_the_root_of_the_rank():
    found, _ = layer(component("transformer", r=4, lora_alpha=8, use_rslora=True), rank=9)
    assert found.scale == pytest.approx(8 / math.sqrt(9))


@pytest.mark.parametrize("key", ["ss_network_alpha", "network_alpha", "lora_alpha"])
def test_one_alpha_for_all_layers_counts_for_kohyas_spelling(key):
    assert layer({key: "1"}, ("lora_up", "lora_down"))[0].scale == 0.25


def test_kohyas_alpha_does_not_count_for_a_converted_file_and_the_user_is_told():
    found, remarks = layer({"ss_network_alpha": "1"})
    assert found.scale == 1.0 and remarks[0].startswith("The header's alpha of 1 is not used")
    assert layer({"ss_network_alpha": "4"})[1] == ()  # the scale is 1 either way


def test_a_tensor_wins_over_the_header():
    found, remarks = layer(component("transformer", lora_alpha=1), **{f"{NAME}.alpha": torch.tensor(3.0)})
    assert (found.alpha, remarks) == (3.0, ())


@pytest.mark.parametrize("value", ["Dynamic", "None", "nan", "inf", "0", "-1", "", "1e999"])
def test_what_is_no_alpha_is_passed_over(value):
    assert layer({"ss_network_alpha": value}, ("lora_up", "lora_down"))[0].scale == 1.0


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", '{"transformer.alpha_pattern": 3}', "[" * 100_000])
def test_damaged_settings_are_passed_over(text):
    assert layer({"lora_adapter_metadata": text})[0].scale == 1.0


def test_a_dora_without_an_alpha_gets_that_of_the_header():
    state = {f"{NAME}.lora_B.weight": torch.ones(6, 4), f"{NAME}.lora_A.weight": torch.ones(4, 5)}
    adapter = from_state_dict({**state, f"{NAME}.dora_scale": torch.ones(6, 1)}, peft(lora_alpha=1))
    assert adapter.extra[f"{NAME}.alpha"].item() == 1.0


def test_each_pattern_of_a_header_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT may write a pattern for each layer, more than Python's own cache holds, and tries all of them on each."""
    compiled: list[str] = []
    compile_one = re.compile
    monkeypatch.setattr(re, "compile", lambda pattern: (compiled.append(pattern), compile_one(pattern))[1])
    settings = {"alpha_pattern": {f"once.{layer}": layer + 1 for layer in range(600)}, "lora_alpha": 0.5}
    found = [header_alpha._peft_alpha(settings, f"diffusion_model.once.{layer}") for layer in (599, 598, 600)]
    assert found == [600, 599, 0.5] and len(compiled) == len(set(compiled)) == 600
