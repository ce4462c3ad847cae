"""Resizing: every rule gives the ranks that it promises, and a file size is kept to."""

import math
from dataclasses import replace

import pytest
import torch

from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.adapter.lora_file import from_state_dict, save
from aclora_core.adapter.metadata import build_metadata
from aclora_core.adapter.rank_report import RankReport
from aclora_core.adapter.resizing import ResizeConfig, resize
from aclora_core.adapter.truncation import decompose
from aclora_core.inspection.tables import truncation_table

NAMES = [f"diffusion_model.joint_blocks.{block}.x_block.attn.proj" for block in range(4)]
SPECTRUM = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


def adapter(rows=24, cols=20):
    """Four layers with one spectrum, the second at a tenth of the size."""
    torch.manual_seed(3)
    layers = {}
    for place, name in enumerate(NAMES):
        left, right = (torch.linalg.qr(torch.randn(side, len(SPECTRUM))).Q for side in (rows, cols))
        values = torch.tensor(SPECTRUM) * (0.1 if place == 1 else 1.0)
        layers[name] = Layer((right * values).T.contiguous(), left, float(len(SPECTRUM)))
    return Adapter(layers)


def report(signal):
    return RankReport({}, [0.5], [], [], {name: SPECTRUM for name in NAMES}, dict(zip(NAMES, signal, strict=True)))


def ranks(config, found=None, given=None):
    source = found or adapter()
    truncated, stats = resize(source, decompose(source), config, given)
    assert {name: layer.rank for name, layer in truncated.layers.items()} == {
        name: layer.rank_after for name, layer in stats.items() if layer.rank_after
    }
    return [stats[name].rank_after for name in NAMES]


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("fixed", 2, [2, 2, 2, 2]),
        ("energy", 0.9, [2, 2, 2, 2]),  # 64 + 16 of 85.3
        ("sum", 0.75, [2, 2, 2, 2]),  # 12 of 15.75
        ("frobenius", 0.99, [3, 3, 3, 3]),
        ("ratio", 0.2, [3, 3, 3, 3]),
        ("threshold", 0.6, [4, 1, 4, 4]),
        ("knee", 0.0, [2, 2, 2, 2]),
    ],
)
def test_each_rule_gives_its_ranks(rule, value, expected):
    assert ranks(ResizeConfig(rule, value)) == expected


def test_no_layer_gets_more_than_the_limit():
    assert ranks(ResizeConfig("energy", 1.0, max_rank=3)) == [3, 3, 3, 3]
    assert ranks(ResizeConfig("signal", max_rank=2), given=report([1, 2, 3, 4])) == [1, 2, 2, 2]
    assert max(ranks(ResizeConfig("file size", 1.0, max_rank=5))) == 5


def test_the_signal_comes_from_the_report_or_from_the_file():
    assert ranks(ResizeConfig("signal"), given=report([1, 2, 3, 99])) == [1, 2, 3, 6]
    with_own = replace(adapter(), metadata={"aclora.trajectory": report([4, 3, 2, 1]).compact_json()})
    assert ranks(ResizeConfig("signal"), with_own) == [4, 3, 2, 1]


def test_the_signal_without_a_report_is_refused():
    with pytest.raises(ValueError, match="needs the report of the training"):
        ranks(ResizeConfig("signal"))
    silent = replace(report([1, 1, 1, 1]), signal={NAMES[0]: 1})
    with pytest.raises(ValueError, match=f"has no signal rank of the layer '{NAMES[1]}'"):
        ranks(ResizeConfig("signal"), given=silent)


def test_a_report_of_another_training_is_refused_by_every_rule():
    stranger = RankReport({}, [], [], [], {"diffusion_model.elsewhere": [1.0]}, {})
    with pytest.raises(ValueError, match="another training"):
        ranks(ResizeConfig("energy"), given=stranger)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [6_500, 8_000, 9_500])
def test_the_saved_file_is_as_large_as_allowed_and_nearly_so(tmp_path, dtype, size):
    source = adapter(96, 80)
    found = report([1, 1, 1, 1])
    config = ResizeConfig("file size", size / 1e6, dtype=dtype)
    truncated, _ = resize(source, decompose(source), config, found)
    path = tmp_path / "truncated.safetensors"
    save(truncated, path, build_metadata(truncated, "truncated", found))
    component = (96 + 80) * dtype.itemsize
    full = all(layer.rank == len(SPECTRUM) for layer in truncated.layers.values())
    assert path.stat().st_size <= size
    # The room left is for a longer name and larger numbers in the header, and less than one more component.
    assert full or path.stat().st_size > size - component - 900


def test_a_small_file_may_drop_the_layer_that_does_least():
    source = adapter(96, 80)
    whole = ResizeConfig("file size", 0.0045, dtype=torch.float16)
    assert min(ranks(whole, source)) == 1
    dropped = ranks(replace(whole, drop_layers=True), source)
    assert dropped[1] == 0 and min(dropped[0], dropped[2], dropped[3]) > 0


def test_a_size_that_no_cut_can_reach_is_refused_with_the_least_one():
    with pytest.raises(ValueError, match="takes at least"):
        ranks(ResizeConfig("file size", 0.001))


def test_the_result_is_in_the_chosen_type_with_all_that_is_no_plain_lora():
    state = {"diffusion_model.a.lokr_w1": torch.ones(2, 2), "diffusion_model.a.lokr_w2": torch.ones(2, 2)}
    state[f"{NAMES[0]}.lora_up.weight"], state[f"{NAMES[0]}.lora_down.weight"] = torch.eye(6, 4), torch.eye(4, 8)
    source = from_state_dict(state)
    truncated, stats = resize(source, decompose(source), ResizeConfig("fixed", 2, dtype=torch.float16))
    assert (
        truncated.extra["diffusion_model.a.lokr_w1"].dtype == truncated.layers[NAMES[0]].lora_up.dtype == torch.float16
    )
    assert truncated.other == {"diffusion_model.a": "LoKr"}
    assert "LoKr, diffusion_model.a" in truncation_table(stats, (2_000, 1_500), truncated.other)
    assert state["diffusion_model.a.lokr_w1"].dtype == torch.float32


def test_a_lora_without_plain_layers_is_refused_by_its_kinds():
    state = {"diffusion_model.a.lokr_w1": torch.ones(2, 2), "diffusion_model.a.lokr_w2": torch.ones(2, 2)}
    source = from_state_dict(state)
    with pytest.raises(ValueError, match="no plain LoRA layer to truncate, only LoKr"):
        resize(source, decompose(source), ResizeConfig())


@pytest.mark.parametrize(
    ("rule", "value"), [("energy", 0.0), ("energy", 1.5), ("ratio", 1.0), ("threshold", -1.0), ("sum", math.nan)]
)
def test_a_parameter_outside_its_range_is_refused(rule, value):
    with pytest.raises(ValueError, match="must be"):
        ranks(ResizeConfig(rule, value))


def test_a_config_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="rank rule must be one of .*, but is 'best'"):
        ResizeConfig("best")
    with pytest.raises(ValueError, match="largest rank must be 0"):
        ResizeConfig(max_rank=-1)


def test_the_table_describes_the_whole_and_each_layer():
    source = adapter()
    _, stats = resize(source, decompose(source), ResizeConfig("fixed", 1))
    text = truncation_table(stats, (2_000, 1_500))
    kept = 64.0 / sum(value * value for value in SPECTRUM)
    assert "Size of the file: 2.00 kB -> 1.50 kB (75%)." in text
    assert "Sum of ranks: 24 -> 4" in text and f"{kept:.2%}" in text and f"{math.sqrt(1 - kept):.1%}" in text
    assert [line.split()[1:3] for line in text.splitlines() if line.startswith("diffusion_model")] == [["6", "1"]] * 4
    rounded_up = {name: replace(layer, energy_kept=1.0 + 2e-16) for name, layer in stats.items()}
    assert "Kept of all layers' energy: 100.00%. Error of the whole change: 0.0%" in truncation_table(
        rounded_up, (2, 1)
    )
    assert truncation_table({}, (0, 0)) == "There is no plain LoRA layer to truncate."


def test_what_was_cut_is_added_to_the_comment_and_the_rest_of_the_metadata_stays():
    state = {"a.lora_up.weight": torch.eye(6, 4), "a.lora_down.weight": torch.eye(4, 5)}
    adapter = from_state_dict(state, {"ss_training_comment": "by hand", "modelspec.author": "somebody"})
    cut, _ = resize(adapter, decompose(adapter), ResizeConfig("fixed", 2))
    assert cut.metadata == {
        "ss_training_comment": "by hand; truncated by AC-LoRA from rank 4 to rank 2, rule 'fixed'",
        "modelspec.author": "somebody",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_size_of_the_file_must_be_finite(value):
    with pytest.raises(ValueError, match="size must be a number of megabytes"):
        ResizeConfig("file size", value)
