"""What a LoRA that was just trained brings along: its file needs no report, and all nodes tell one size."""

import re

from safetensors import safe_open

from tests.support import tiny_base as tiny
from tests.support.tiny_base import QUICK
from tests.support.train_node import run_node

# Fixtures: the tiny base and two images.
parts, model, pictures = tiny.parts, tiny.model, tiny.pictures
SIZE = re.compile(r"\b[\d.]+ (?:kB|MB)\b")


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_lora_is_saved_without_its_report_as_with_it_and_has_one_size(pack, model, pictures, loras):
    latents, captions = pictures
    texts = ("a red diamond, inky", "a blue ball, inky")
    marked = [
        pack.nodes.host.with_caption(each, text, True, "inky") for each, text in zip(captions, texts, strict=True)
    ]
    output = run_node(pack, model, latents, marked, QUICK)
    _, lora_model, _, report, _ = output.result
    save = pack.nodes.adapter.save.ACLoRASave.execute
    alone, with_report = (save(lora_model, "ink", rank_report=given) for given in (None, report))
    found, expected = metadata_of(loras / alone[0]), metadata_of(loras / with_report[0])
    assert found["modelspec.trigger_phrase"] == "inky" and '"a red diamond": 1' in found["ss_tag_frequency"]
    assert found["aclora.base_model"] == "SD3" and found["aclora.format"] == "diffusers"
    names = {"ss_output_name", "modelspec.title"}
    assert {key: value for key, value in found.items() if key not in names} == {
        key: value for key, value in expected.items() if key not in names
    }
    table = pack.nodes.adapter.inspect.ACLoRAInspect.execute("none", lora_model=lora_model)[1]
    shown = (output.ui["text"][0], alone.ui.as_dict()["text"][0], table)
    sizes = {SIZE.search(text)[0] for text in shown}
    assert len(sizes) == 1 and abs((loras / alone[0]).stat().st_size / report.facts.file_size - 1) < 0.002
