"""Metadata of a saved LoRA, for people and for other programs."""

import base64
import json
from dataclasses import replace
from datetime import datetime, timezone
from io import BytesIO

import pytest
import torch
from PIL import Image

from aclora_core.adapter.adapter import Adapter, Layer
from aclora_core.adapter.lora_file import load, save
from aclora_core.adapter.metadata import build_metadata, describe_layers, resolution_text, thumbnail_url, with_comment
from aclora_core.adapter.rank_report import RankReport
from aclora_core.adapter.training_facts import TrainingFacts
from aclora_core.storage.safetensors_file import HEADER_LIMIT


def adapter_of(*ranks, alpha=None):
    names = [f"diffusion_model.block.{index}" for index in range(len(ranks))]
    layers = {
        name: Layer(torch.ones(rank, 8), torch.ones(6, rank), float(alpha or rank))
        for name, rank in zip(names, ranks, strict=True)
    }
    return Adapter(layers)


SETTINGS = {"steps": 120, "learning_rate": 5e-4, "batch_size": 4, "seed": 42}
FACTS = {
    "images": 16,
    "held_out_images": 3,
    "regularisation_images": 5,
    "base_model": "SDXL",
    "resolution": "1024",
    "started_at": 1700000000.5,
    "finished_at": 1700000060.25,
    "trigger": "tusche",
}


def report_for(adapter, **facts):
    spectrum = {base: [2.0, 1.0] for base in adapter.layers}
    return RankReport(
        settings=SETTINGS,
        losses=[0.5] * 77,
        validation=[(10, 0.4)],
        restarts=[],
        spectrum=spectrum,
        signal=dict.fromkeys(adapter.layers, 1),
        facts=TrainingFacts(**{**FACTS, **facts}),
    )


def test_all_keys_and_values_are_text_and_survive_the_file(tmp_path):
    adapter = adapter_of(2, 4)
    metadata = build_metadata(adapter, "ink", report_for(adapter), trigger="墨 style")
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    save(adapter, tmp_path / "ink.safetensors", metadata)
    assert metadata.items() <= load(tmp_path / "ink.safetensors").metadata.items()


def test_the_minimum_of_both_conventions_is_there_without_a_report():
    metadata = build_metadata(adapter_of(4, 4), "ink")
    for key in ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args"):
        assert f"ss_{key}" in metadata
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "ink"
    assert json.loads(metadata["ss_network_args"]) == {}
    assert "ss_steps" not in metadata and "aclora.settings" not in metadata


def test_settings_are_found_where_other_programs_look():
    adapter = adapter_of(4, 4)
    metadata = build_metadata(adapter, "ink", report_for(adapter))
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.resolution": "1024x1024",
        "ss_steps": "77",
        "ss_max_train_steps": "120",
        "ss_learning_rate": "0.0005",
        "ss_seed": "42",
        "ss_num_train_images": "16",
        "ss_num_validation_images": "3",
        "ss_num_reg_images": "5",
        "ss_training_started_at": "1700000000.5",
        "ss_training_finished_at": "1700000060.25",
        "modelspec.trigger_phrase": "tusche",
    }
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["ss_tag_frequency"]) == {"1_tusche": {"tusche": 16}}
    assert json.loads(metadata["aclora.settings"]) == {**SETTINGS, **FACTS}


def test_the_report_comes_back_from_the_file():
    adapter = adapter_of(2, 4)
    report = report_for(adapter)
    assert json.loads(build_metadata(adapter, "ink", report)["aclora.trajectory"]) == json.loads(report.compact_json())


@pytest.mark.parametrize(
    ("ranks", "alpha", "dim", "network_alpha"),
    [((4, 4), None, "4", "4.0"), ((2, 4), None, "Dynamic", "Dynamic"), ((2, 4), 8, "Dynamic", "8.0")],
)
def test_ranks_that_differ_are_called_dynamic_and_listed(ranks, alpha, dim, network_alpha):
    metadata = build_metadata(adapter_of(*ranks, alpha=alpha), "ink")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (dim, network_alpha)
    assert json.loads(metadata["aclora.ranks"]) == list(ranks)


def test_a_trigger_given_by_hand_wins_over_the_one_of_the_training():
    adapter = adapter_of(2)
    metadata = build_metadata(adapter, "ink", report_for(adapter), trigger="by hand")
    assert metadata["modelspec.trigger_phrase"] == "by hand" and "by hand" in metadata["ss_tag_frequency"]


FOREIGN = {
    "format": "pt",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_dim": "64",
    "ss_training_comment": "drawn by hand",
    "sshs_model_hash": "0" * 64,
    "modelspec.hash_sha256": "0x" + "0" * 64,
    "modelspec.trigger_phrase": "inky",
    "modelspec.author": "somebody",
    "modelspec.license": "CC-BY-4.0",
    "modelspec.title": "Ink",
    "modelspec.date": "2024-01-01",
    "modelspec.description": "Ink on paper",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "lora_adapter_metadata": "{}",
    "ss_tag_frequency": json.dumps({"10_ink": {"inky": 3}}),
}


def test_what_a_file_of_another_program_says_survives():
    written = build_metadata(replace(adapter_of(4, 4), metadata=FOREIGN), "small")
    kept = FOREIGN.keys() - {"format", "sshs_model_hash", "modelspec.hash_sha256", "lora_adapter_metadata"}
    assert {key: written[key] for key in kept} == {key: FOREIGN[key] for key in kept} | {"ss_network_dim": "4"}
    assert not written.keys() & (FOREIGN.keys() - kept)  # the hashes are computed anew, and alpha is in the tensors
    assert written["ss_output_name"] == "small"


def test_a_file_of_another_program_is_not_told_as_ours():
    metadata = {"modelspec.author": "somebody"}
    written = build_metadata(replace(adapter_of(4), metadata=metadata), "small")
    assert not written.keys() & {"ss_training_comment", "modelspec.date", "modelspec.implementation"}
    assert written["modelspec.architecture"] == "unknown/lora"


def test_our_own_file_keeps_its_training_with_and_without_the_report():
    adapter = adapter_of(2, 4)
    report = report_for(adapter)
    first = build_metadata(adapter, "ink", replace(report, tags={"tusche": 16, "a cat": 2}), "by hand")
    for given in (None, report):  # the report of a file has no tags
        again = build_metadata(replace(adapter, metadata=first), "ink", given)
        assert again == first


def test_a_title_that_is_a_files_name_follows_the_file():
    first = build_metadata(adapter_of(4), "ink")
    again = build_metadata(replace(adapter_of(4), metadata=first), "small")
    assert again["modelspec.title"] == again["ss_output_name"] == "small"


def test_the_description_of_our_own_file_follows_its_layers():
    first = build_metadata(adapter_of(4), "ink")
    assert (
        build_metadata(replace(adapter_of(2), metadata=first), "ink")["modelspec.description"] == "1 LoRA layer, rank 2"
    )


def test_the_tags_of_the_captions_are_counted_where_other_programs_look():
    adapter = adapter_of(2)
    report = replace(report_for(adapter), tags={"a cat": 2, "tusche": 16, "a dog": 1})
    frequency = json.loads(build_metadata(adapter, "ink", report)["ss_tag_frequency"])
    assert list(frequency["1_tusche"].items()) == [("tusche", 16), ("a cat", 2), ("a dog", 1)]
    without = replace(report, facts=replace(report.facts, trigger=""))
    assert json.loads(build_metadata(adapter, "ink", without)["ss_tag_frequency"])["1_captions"] == report.tags


def test_thousands_of_tags_are_bounded():
    report = replace(report_for(adapter_of(2)), tags={f"tag {number:05}": number for number in range(10_000)})
    (tags,) = json.loads(build_metadata(adapter_of(2), "ink", report)["ss_tag_frequency"]).values()
    assert "tag 09999" in tags and "tusche" in tags and 50_000 < sum(map(len, tags)) < 60_010


def test_metadata_that_would_not_fit_is_left_out_the_longest_first(tmp_path, caplog):
    metadata = {"ss_datasets": "d" * 700_000, "modelspec.author": "somebody"}
    adapter = replace(adapter_of(2), metadata=metadata)
    written = build_metadata(adapter, "ink")
    assert "ss_datasets" not in written and written["modelspec.author"] == "somebody"
    assert "'ss_datasets' of the LoRA's metadata is too long" in caplog.text
    save(adapter, tmp_path / "ink.safetensors", written)


def test_a_comment_comes_after_those_before_it():
    assert with_comment({}, "cut")["ss_training_comment"] == "cut"
    assert with_comment({"ss_training_comment": "by hand"}, "cut")["ss_training_comment"] == "by hand; cut"


def test_a_base_model_that_kohya_does_not_know_keeps_its_own_name():
    adapter = adapter_of(2)
    metadata = build_metadata(adapter, "ink", report_for(adapter, base_model="QwenImage"))
    assert metadata["ss_base_model_version"] == "qwenimage"
    assert metadata["modelspec.architecture"] == "qwenimage/lora"


def test_a_report_of_another_training_is_refused_with_the_layer():
    with pytest.raises(ValueError, match=r"another training: it lacks the layer 'diffusion_model\.block\.1'"):
        build_metadata(adapter_of(2, 2), "ink", report_for(adapter_of(2)))


def test_an_adapter_that_lost_layers_to_a_cut_still_fits_its_report():
    assert build_metadata(adapter_of(2), "ink", report_for(adapter_of(2, 2)))["ss_network_dim"] == "2"


def test_the_date_can_be_given():
    when = datetime(2026, 11, 22, 12, 0, tzinfo=timezone.utc)
    adapter = adapter_of(2)
    metadata = build_metadata(adapter, "ink", report_for(adapter), when=when)
    assert metadata["modelspec.date"] == "2026-11-22T12:00:00+00:00"


def test_a_lora_of_unknown_origin_is_not_called_ours():
    metadata = build_metadata(adapter_of(2), "found")
    assert not {"ss_training_comment", "modelspec.implementation", "modelspec.date"} & metadata.keys()
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "found"


@pytest.mark.parametrize(("given", "text"), [(512, "512x512"), ("512", "512x512"), ("512x768", "512x768")])
def test_a_resolution_is_written_as_width_and_height(given, text):
    assert resolution_text(given) == text


@pytest.mark.parametrize("shape", [(600, 300, 3), (2, 600, 300, 3), (1, 600, 300, 4)])
def test_a_thumbnail_is_a_small_jpeg_of_the_image(shape):
    image = torch.zeros(shape)
    image[..., 0] = 1.0
    url = thumbnail_url(image)
    head, data = url.split(",")
    thumbnail = Image.open(BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and thumbnail.format == "JPEG"
    assert thumbnail.size == (128, 256) and len(url) < HEADER_LIMIT // 20
    red, green, blue = thumbnail.getpixel((64, 128))
    assert red > 245 and green < 10 and blue < 10


def test_layers_and_ranks_are_described_in_words():
    assert describe_layers(adapter_of(4)) == "1 LoRA layer, rank 4"
    assert describe_layers(adapter_of(2, 4)) == "2 LoRA layers, ranks 2 to 4"
    assert describe_layers(Adapter({}, other={"a": "OFT"})) == "no plain LoRA layers"
