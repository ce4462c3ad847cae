"""Bad input from end to end: one sentence that names the file, the layer or the key, and nothing is written."""

import json
from pathlib import Path

import pytest
import torch

from aclora_core.adapter import lora_file as adapter_file
from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.adapter.metadata import build_metadata
from aclora_core.adapter.rank_report import RankReport
from aclora_core.adapter.resizing import ResizeConfig, resize
from aclora_core.adapter.state_dict import to_state_dict
from aclora_core.adapter.truncation import decompose
from aclora_core.method.restart import restart_adapter
from aclora_core.method.spectrum import delta_singular_values

NAME = "diffusion_model.block.attn"


def one_layer() -> Adapter:
    return Adapter({NAME: Layer(torch.randn(4, 9), torch.randn(7, 4), 4.0)})


@pytest.mark.parametrize("length", [2**31, 2**31 - 1, 2**40])
def test_a_header_of_two_gigabytes_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    """One file only claims such a header; the other is so long (with holes, so that it takes no room)."""
    short, long = tmp_path / "short.safetensors", tmp_path / "long.safetensors"
    for path in (short, long):
        path.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * 100)
    with open(long, "r+b") as file:
        file.truncate(min(length, 2**31) + 64)
    for path in (short, long):
        with pytest.raises(ValueError, match=rf"{path.name} is not a safetensors file.* should take {length:,} bytes"):
            adapter_file.load(path)


def test_a_header_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    header = b'{"a":' * 50_000
    path = tmp_path / "deep.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"deep\.safetensors is damaged"):
        adapter_file.load(path)


def test_nan_in_a_layer_is_named_wherever_it_is_met(tmp_path: Path) -> None:
    adapter = one_layer()
    adapter.layers[NAME].lora_up[3, 2] = torch.nan
    layer = adapter.layers[NAME]
    with pytest.raises(ValueError, match=f"Layer '{NAME}': lora_up holds NaN"):
        restart_adapter({NAME: (layer.lora_down, layer.lora_up, 1.0)}, 0.5, torch.Generator())
    with pytest.raises(ValueError, match=f"Layer '{NAME}': lora_up holds NaN"):
        decompose(adapter)
    with pytest.raises(ValueError, match=f"'{NAME}.lora_up.weight' holds NaN"):
        adapter_file.save(adapter, tmp_path / "x.safetensors", {})
    with pytest.raises(ValueError, match=f"'{NAME}.lora_up.weight' holds NaN"):
        adapter_file.from_state_dict(to_state_dict(adapter))
    with pytest.raises(ValueError, match="lora_up holds NaN"):
        delta_singular_values(*layer.factors(), 1.0)
    assert not list(tmp_path.iterdir())


def test_a_report_of_another_training_is_refused_with_the_layer_before_cutting_and_saving(tmp_path: Path) -> None:
    adapter = one_layer()
    stranger = RankReport({}, [0.5], [], [], {"diffusion_model.elsewhere": [1.0]}, {"diffusion_model.elsewhere": 1})
    for rule in ("signal", "energy", "file size"):
        with pytest.raises(ValueError, match=f"another training: it lacks the layer '{NAME}'"):
            resize(adapter, decompose(adapter), ResizeConfig(rule, 0.9), stranger)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"lacks the layer '{NAME}'"):
        metadata = build_metadata(adapter, "x", stranger)
        adapter_file.save(adapter, tmp_path / "x.safetensors", metadata)
    assert not list(tmp_path.iterdir())


def test_a_damaged_report_in_a_file_stops_only_the_rule_that_needs_it() -> None:
    layers = one_layer().layers
    for text in ("", "{", "[]", json.dumps({"format": "another"})):
        adapter = Adapter(layers, {"aclora.trajectory": text})
        truncated, _ = resize(adapter, decompose(adapter), ResizeConfig("fixed", 2))
        assert truncated.layers[NAME].rank == 2
        with pytest.raises(ValueError, match="needs the report of the training"):
            resize(adapter, decompose(adapter), ResizeConfig("signal"))


@pytest.mark.parametrize(
    ("rule", "value", "sentence"),
    [
        ("fixed", 0, "at least 1, but is 0"),
        ("fixed", -3, "but is -3"),
        ("fixed", float("nan"), "but is nan"),
        ("energy", 0.0, "above 0 and at most 1, but is 0"),
        ("energy", 1.01, "but is 1.01"),
        ("sum", -1.0, "but is -1"),
        ("frobenius", float("nan"), "but is nan"),
        ("ratio", 1.0, "but is 1.0"),
        ("threshold", float("-inf"), "but is -inf"),
        ("file size", 0.0, "is too small"),
        ("file size", -1.0, "is too small"),
    ],
)
def test_a_rank_or_share_outside_its_range_is_refused_with_its_value(rule, value: float, sentence: str) -> None:
    adapter = one_layer()
    with pytest.raises(ValueError, match=sentence) as caught:
        resize(adapter, decompose(adapter), ResizeConfig(rule, value))
    assert "\n" not in str(caught.value)
