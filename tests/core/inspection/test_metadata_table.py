"""The table of a LoRA file's metadata: aligned, and in words in place of JSON."""

import json

import pytest
import torch

from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.adapter.file_size import file_size
from aclora_core.adapter.metadata import build_metadata
from aclora_core.adapter.rank_report import RankReport
from aclora_core.adapter.resizing import ResizeConfig, resize
from aclora_core.adapter.training_facts import TrainingFacts
from aclora_core.adapter.truncation import decompose
from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss
from aclora_core.inspection.metadata_table import metadata_table, truncation_rows
from aclora_core.text import size_change

NAMES = ["diffusion_model.block.0", "diffusion_model.block.1"]
SETTINGS = {"steps": 120, "learning_rate": 5e-4, "clear_moments": True}
FACTS = TrainingFacts(started_at=1795389858.26, trigger="ink")


def adapter_of(*ranks, metadata=None, other=None):
    torch.manual_seed(0)
    layers = {
        name: Layer(torch.randn(rank, 8), torch.randn(6, rank), float(rank))
        for name, rank in zip(NAMES, ranks, strict=True)
    }
    return Adapter(layers, metadata or {}, other or {})


def trained(*ranks):
    """An adapter with all that Save AC-LoRA writes."""
    adapter = adapter_of(*ranks)
    truncations = [
        TruncationLoss(Truncation.from_name("rank 2"), 2.0, 750_000, 0.42, 0.0, True),
        TruncationLoss(Truncation.from_name("whole"), 4.0, 10**6, 0.43, 0.01, False),
    ]
    spectrum, signal = {name: [2.0, 1.0] for name in NAMES}, dict(zip(NAMES, (1, 4), strict=True))
    report = RankReport(SETTINGS, [0.5] * 9, [(4, 0.45), (8, 0.41)], [], spectrum, signal, truncations, FACTS)
    return Adapter(adapter.layers, build_metadata(adapter, "ink", report))


def words(table):
    return [" ".join(line.split()) for line in table.splitlines()]


def test_a_foreign_file_has_its_facts_and_its_metadata():
    metadata = {"ss_seed": "42", "long": "line\n" * 100, "pic": "data:image/x"}
    adapter = Adapter(adapter_of(2, 4).layers, metadata, {"x": "LoKr", "y": "LoKr", "z": "DoRA"})
    assert metadata_table("ink.safetensors", adapter).splitlines()[:7] == [
        "file     ink.safetensors",
        "layers   2 LoRA layers, ranks 2 to 4, float32",
        "also     1 x DoRA",
        "also     2 x LoKr",
        "",
        "Metadata",
        f"long     {('line ' * 40)[:200]}… (499 characters)",
    ]
    assert {"ss_seed 42", "pic an image, 12 characters"} <= set(words(metadata_table("ink", adapter)))
    assert "Training" not in metadata_table("ink", adapter)


def test_a_file_without_plain_layers_or_metadata_says_so():
    lines = ["file    x", "layers  no plain LoRA layers", "also    1 x OFT"]
    assert metadata_table("x", Adapter({}, other={"a": "OFT"})).splitlines() == lines


def test_the_training_is_described_in_words():
    table = metadata_table("ink.safetensors", trained(4, 4))
    training = table.split("\n\n")[1]
    assert words(training) == [
        "Training",
        "clear_moments True",
        "learning_rate 0.0005",
        "started_at 2026-11-22 23:24:18 UTC",
        "steps 120",
        "trigger ink",
        "signal ranks 1 to 4, mean 2.5",
        "validation loss 0.4100 at step 8, the lowest of 2",
        "given rank 2, of 2 truncations that were tried",
    ]
    assert "aclora." not in table and "{" not in training


def test_a_training_without_held_out_images_tells_how_well_it_fits_its_own():
    adapter = adapter_of(4, 4)
    fit = [(0, 0.5), (80, 0.3), (560, 0.0904)]
    report = RankReport(SETTINGS, [0.5] * 560, [], [], {}, dict(zip(NAMES, (1, 4), strict=True)), fit=fit)
    lines = words(metadata_table("ink", Adapter(adapter.layers, build_metadata(adapter, "ink", report))))
    assert "training images loss 0.0904 at step 560, 18 % of the base model's" in lines
    assert not any(line.startswith("validation loss") for line in lines)


def test_the_second_columns_of_all_sections_line_up():
    table = metadata_table("ink.safetensors", trained(4, 4), [("size of the file", "1 kB -> 2 kB")])
    column = table.index("ink.safetensors")
    for line in table.splitlines():
        assert line in ("", "Training", "Metadata") or (line[column - 2 : column] == "  " and line[column] != " ")


@pytest.mark.parametrize(
    "metadata",
    [
        {"aclora.settings": "{", "aclora.trajectory": "?"},
        {"aclora.settings": "[1]", "aclora.trajectory": "[" * 100_000},
        {"aclora.settings": json.dumps({"started_at": "soon", "finished_at": 1e300}), "aclora.ranks": "none"},
    ],
    ids=["no json", "a list", "odd times"],
)
def test_damaged_metadata_is_shown_as_it_is(metadata):
    lines = words(metadata_table("ink", adapter_of(2, 4, metadata=metadata)))
    if "Training" in lines:
        assert "started_at soon" in lines and "finished_at 1e+300" in lines
    else:
        assert any(line.startswith(f"aclora.settings {metadata['aclora.settings']}") for line in lines)
        assert max(map(len, lines)) < 250


def test_a_truncation_is_shown_as_ranks_energy_and_size():
    adapter = adapter_of(4, 6)
    result, stats = resize(adapter, decompose(adapter), ResizeConfig("fixed", 2))
    rows = dict(truncation_rows("to rank 2", adapter, result, stats))
    assert rows["truncated"] == "to rank 2" and rows["ranks"] == "4 to 6, mean 5.0 -> 2 in every layer"
    sizes = file_size(adapter, dtype=None), file_size(result, dtype=None)
    # (4 + 6) · 14 numbers of 4 bytes before, (2 + 2) · 14 after, and a comment on the truncation.
    assert 240 < sizes[0] - sizes[1] < 336
    assert rows["size of the file"] == size_change(*sizes)
    before, after = (
        torch.stack([layer.scale * layer.lora_up @ layer.lora_down for layer in each.layers.values()])
        for each in (adapter, result)
    )
    lost = float((before - after).square().sum() / before.square().sum())
    assert rows["energy kept"] == f"{1 - lost:.2%}, so the change differs by {lost**0.5:.1%} of its size"


def test_a_truncation_without_loss_keeps_100_percent():
    adapter = adapter_of(2, 2)
    result, stats = resize(adapter, decompose(adapter), ResizeConfig("fixed", 2))
    kept = dict(truncation_rows("to rank 2", adapter, result, stats))["energy kept"]
    assert kept.startswith("100.00%, so the change differs by 0.0%")
