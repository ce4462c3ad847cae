"""Inspection of LoRAs whose content is known, and its text, JSON and CSV."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
import torch

from aclora_core.adapter.adapter import Layer
from aclora_core.adapter.key_formats import KEY_FORMATS
from aclora_core.adapter.lora_file import from_state_dict, save_in_format
from aclora_core.adapter.metadata import build_metadata
from aclora_core.adapter.rank_report import RankReport, Restart, embedded_report
from aclora_core.adapter.truncation_loss import Truncation, TruncationLoss
from aclora_core.inspection.charts import inspection_charts
from aclora_core.inspection.measure import inspect_lora, measure_layer
from aclora_core.inspection.tables import file_table, inspection_csv, inspection_json, inspection_table
from aclora_core.method.restart import LayerRank

QKV = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
PROJ = "diffusion_model.joint_blocks.1.x_block.attn.proj"
PATCH = "diffusion_model.x_embedder.proj"


def layer_with(values, rows=6, cols=8, alpha=None):
    """A layer whose delta has exactly these singular values."""
    rank = len(values)
    torch.manual_seed(rank)
    left, right = torch.linalg.qr(torch.randn(rows, rank)).Q, torch.linalg.qr(torch.randn(cols, rank)).Q
    scale = 1.0 if alpha is None else alpha / rank
    return Layer(right.T * torch.tensor(values)[:, None] / scale, left, float(rank if alpha is None else alpha))


def state_of(layers, pair=KEY_FORMATS[0]):
    state = {}
    for name, layer in layers.items():
        state |= {name + pair[0]: layer.lora_up, name + pair[1]: layer.lora_down}
        state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state


def two_layers():
    return state_of({PROJ: layer_with([2.0, 1.0, 0.5]), QKV: layer_with([4.0, 3.0], alpha=1.0)})


def report_for(names, signal=2):
    ranks = {name: LayerRank(3, 2, signal, 0.9) for name in names}
    spectrum = {name: [4.0, 3.0] for name in names}
    restarts = [Restart(1, 1, 0.5, 0.5, ranks)]
    return RankReport({"seed": 7}, [0.5, 0.4], [], restarts, spectrum, dict.fromkeys(names, signal))


def test_the_facts_of_a_layer_whose_spectrum_is_known():
    facts = measure_layer(QKV, layer_with([4.0, 3.0, 0.0], alpha=1.5))
    assert (facts.block, facts.module) == ("joint_blocks.0", "x_block.attn.qkv")
    assert (facts.kind, facts.shape) == ("linear", (6, 8))
    assert (facts.rank, facts.alpha, facts.scale, facts.dtype) == (3, 1.5, 0.5, "float32")
    torch.testing.assert_close(torch.tensor(facts.spectrum), torch.tensor([4.0, 3.0, 0.0]), atol=1e-5, rtol=1e-5)
    assert facts.norm == pytest.approx(5.0, rel=1e-5) and facts.sigma_first == pytest.approx(4.0, rel=1e-5)
    assert facts.stable_rank == pytest.approx(25 / 16, rel=1e-4)
    entropy = -(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7))
    assert facts.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
    assert facts.dead == 1 and facts.ratio > 1e5
    assert (facts.parameters, facts.size) == (3 * 14, 3 * 14 * 4)


def test_ranks_for_shares_of_the_energy():
    # Energies 90, 6, 3.5 and 0.5: of 100.
    facts = measure_layer(QKV, layer_with([math.sqrt(part) for part in (90.1, 5.9, 3.5, 0.5)]))
    assert (facts.rank_90, facts.rank_95, facts.rank_99) == (1, 2, 3)


def test_a_layer_that_does_nothing_has_finite_facts():
    facts = measure_layer(QKV, Layer(torch.randn(4, 8), torch.zeros(6, 4), 4.0))
    assert facts.norm == facts.sigma_first == 0.0 and facts.ratio == math.inf
    assert facts.dead == 4 and facts.stable_rank == facts.effective_rank == 1.0 and facts.rank_99 == 1


def test_a_rank_beyond_the_layer_s_sides_is_dead():
    facts = measure_layer(QKV, Layer(torch.eye(5, 3), torch.ones(2, 5).contiguous(), 5.0))
    assert len(facts.spectrum) == 2 and facts.dead == 4


def test_a_convolution_is_named_with_its_window():
    facts = measure_layer(PATCH, Layer(torch.randn(2, 16, 3, 3), torch.randn(8, 2, 1, 1), 2.0))
    assert facts.kind == "conv 3x3" and facts.shape == (8, 16, 3, 3) and facts.parameters == 2 * 16 * 9 + 8 * 2


def test_half_precision_is_measured_in_full(tmp_path):
    layer = layer_with([4.0, 3.0])
    half = Layer(layer.lora_down.bfloat16(), layer.lora_up.bfloat16(), 2.0)
    facts = measure_layer(QKV, half)
    built = half.lora_up.double() @ half.lora_down.double()
    assert facts.norm == pytest.approx(float(built.norm()), rel=1e-6) and facts.dtype == "bfloat16"


def test_layers_are_in_the_model_s_order_and_progress_is_reported():
    seen = []
    found = inspect_lora(two_layers(), on_layer=lambda done, total: seen.append((done, total)))
    assert [layer.name for layer in found.layers] == [QKV, PROJ] and seen == [(1, 2), (2, 2)]


def test_the_file_is_summed_up():
    state = {**two_layers(), "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(6, 2).half()}
    state["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(2, 8).half()
    facts = inspect_lora(state, {"ss_seed": "7", "notes": "n" * 900}, "ink.safetensors", 1234).file
    assert facts.prefixes == {"diffusion_model.": 2, "lora_te1_": 1}
    assert facts.parts == {"diffusion model": 2, "te1": 1} and facts.blocks == 3
    assert facts.ranks == {2: 2, 3: 1} and facts.dtypes == {"float32": 2, "float16": 1}
    assert facts.size == 1234 and facts.parameters == (3 + 2 + 2) * 14
    assert facts.norm == pytest.approx(math.sqrt(5.25 + 25 + 4 * 6 * 8), rel=1e-4)
    assert facts.metadata["ss_seed"] == "7" and len(facts.metadata["notes"]) < 100


def test_without_a_file_the_size_is_that_of_the_file_as_which_it_would_be_saved(tmp_path):
    adapter = from_state_dict(two_layers())
    save_in_format(adapter, tmp_path / "it.safetensors", build_metadata(adapter, ""), dtype=torch.float16)
    assert inspect_lora(two_layers()).file.size == (tmp_path / "it.safetensors").stat().st_size


@pytest.mark.parametrize("form", KEY_FORMATS, ids=lambda form: form.name)
def test_all_spellings_of_keys_are_named_and_measure_the_same(form):
    found = inspect_lora(state_of({QKV: layer_with([4.0, 3.0])}, form))
    assert found.file.key_formats == {form.name: 1}
    assert found.layers[0].norm == pytest.approx(5.0, rel=1e-5)


def test_layers_of_other_kinds_are_named_by_their_kind():
    state = two_layers()
    state["diffusion_model.a.lokr_w1"], state["diffusion_model.a.lokr_w2"] = torch.ones(2, 2), torch.ones(2, 2)
    state[f"{PROJ}.dora_scale"] = torch.ones(6, 1)
    found = inspect_lora(state)
    assert found.file.other == {"diffusion_model.a": "LoKr", PROJ: "DoRA"}
    assert [layer.name for layer in found.layers] == [QKV]
    text = inspection_table(found)
    assert "no plain LoRA: LoKr  diffusion_model.a" in text and f"no plain LoRA: DoRA  {PROJ}" in text


def test_a_file_without_any_plain_lora_has_a_table_and_a_chart():
    state = {"diffusion_model.a.lokr_w1": torch.ones(2, 2), "diffusion_model.a.lokr_w2": torch.ones(2, 2)}
    found = inspect_lora(state)
    assert found.layers == [] and "0 plain LoRA layers" in inspection_table(found)
    assert len(inspection_charts(found)) == 1
    assert json.loads(inspection_json(found))["layers"] == [] and inspection_csv(found).count("\n") == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state[f"{QKV}.lora_up.weight"].fill_(math.nan), "lora_up.weight' holds NaN or infinity"),
        (lambda state: state.clear(), "There is no LoRA in it"),
    ],
)
def test_a_damaged_lora_is_refused_by_the_key(change, sentence):
    state = {key: tensor.clone() for key, tensor in two_layers().items()}
    change(state)
    with pytest.raises(ValueError, match=sentence):
        inspect_lora(state)


def test_the_report_of_the_training_gives_the_signal():
    found = inspect_lora(two_layers(), report=report_for([QKV, PROJ]))
    assert [layer.signal for layer in found.layers] == [2, 2] and found.layers[0].shown_rank == 2
    text = inspection_table(found)
    assert "signal" in text and "Restarts" in text and "2.0 (2 to 2)" in text
    assert len(inspection_charts(found)) == 5


def test_truncation_losses_are_in_charts_table_and_json():
    truncations = [
        TruncationLoss(Truncation.from_name("rank 1"), 1.0, 750, 0.46, 0.004, True),
        TruncationLoss(Truncation.from_name("whole"), 2.5, 1875, 0.45, 0.0, False),
    ]
    report = replace(report_for([QKV, PROJ]), truncations=truncations)
    # As a training hands it on, and as a file keeps it.
    for given in ({"report": report}, {"metadata": {"aclora.trajectory": report.compact_json()}}):
        found = inspect_lora(two_layers(), **given)
        assert len(inspection_charts(found)) == 6
        lines = inspection_table(found).splitlines()
        assert next(line for line in lines if line.startswith("rank 1")).split()[-1] == "yes"
        assert any(line.startswith("Truncated at the end of the training") for line in lines)
        assert [tried["name"] for tried in json.loads(inspection_json(found))["training"]["cuts"]] == [
            "rank 1",
            "whole",
        ]
    assert "validation loss" not in inspection_table(inspect_lora(two_layers(), report=report_for([QKV, PROJ])))


def test_without_a_report_the_table_has_no_column_for_the_signal():
    found = inspect_lora(two_layers())
    assert "signal" not in inspection_table(found) and found.layers[0].shown_rank == found.layers[0].rank_95
    assert len(inspection_charts(found)) == 3


def test_the_report_of_another_training_is_refused_by_the_layer():
    with pytest.raises(ValueError, match=f"another training: it lacks the layer '{QKV}'"):
        inspect_lora({k: t for k, t in two_layers().items() if k.startswith(QKV)}, report=report_for([PROJ]))


def test_a_file_s_own_report_is_taken_if_it_fits():
    own = {"aclora.trajectory": report_for([QKV, PROJ], 1).compact_json()}
    found = inspect_lora(two_layers(), own)
    assert [layer.signal for layer in found.layers] == [1, 1] and len(found.report.restarts) == 1
    for text in (report_for([QKV]).compact_json(), "{}", "?"):
        metadata = {"aclora.trajectory": text}
        assert embedded_report(from_state_dict(two_layers(), metadata)) is None
        assert inspect_lora(two_layers(), metadata).report is None


def test_the_json_is_strict_and_has_the_spectra():
    state = {**two_layers(), **state_of({"diffusion_model.zero": Layer(torch.ones(2, 8), torch.zeros(6, 2), 2.0)})}
    text = inspection_json(inspect_lora(state, report=report_for([QKV, PROJ, "diffusion_model.zero"])))
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert layers[QKV]["spectrum"] == pytest.approx([4.0, 3.0], rel=1e-5)
    assert layers["diffusion_model.zero"]["ratio"] is None
    assert data["file"]["ranks"] == {"2": 2, "3": 1} and data["training"]["settings"] == {"seed": 7}


def test_the_csv_has_a_line_for_each_layer():
    rows = list(csv.DictReader(io.StringIO(inspection_csv(inspect_lora(two_layers())))))
    assert [row["name"] for row in rows] == [QKV, PROJ]
    assert rows[0]["shape"] == "6x8" and rows[0]["signal"] == ""
    assert float(rows[0]["norm"]) == pytest.approx(5.0, rel=1e-5)
    assert "spectrum" not in rows[0]


def test_the_table_has_a_line_for_each_layer_and_explains_its_columns():
    lines = inspection_table(inspect_lora(two_layers(), name="ink")).splitlines()
    row = next(line for line in lines if line.startswith(QKV))
    assert row.split()[1:8] == ["linear", "6", "x", "8", "2", "1", "0.5"]
    assert any(line.startswith("stable rank") for line in lines) and lines[0] == "name      ink"


def test_line_breaks_in_metadata_do_not_break_the_table():
    facts = inspect_lora(two_layers(), {"comment": "one\ntwo"}).file
    assert "comment   one two" in file_table(facts)
