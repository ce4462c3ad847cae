"""The trigger word and the captions' tags, from the dataset to the LoRA file."""

import pytest
import torch

from tests.support import tiny_base as tiny
from tests.support.tiny_base import trained

parts, model, pictures = tiny.parts, tiny.model, tiny.pictures


@pytest.fixture
def keys(pack):
    return pack.nodes.host.private_keys


def entry(keys, caption, trigger=""):
    return [[None, {keys.CAPTION_KEY: caption, **({keys.TRIGGER: trigger} if trigger else {})}]]


def test_the_tags_of_each_image_count_once(pack, keys):
    """Variants of an image count once, its repeats each time, regularisation images never."""
    rows = [
        ({"picture": 0, "variant": 0}, "ink, a cat"),
        ({"picture": 0, "variant": 1}, "a cat, ink"),
        ({"picture": 1, "variant": 0}, "ink, a cat"),
        ({"picture": 2, "variant": 0, "regularisation": 1.0}, "a photo"),
        (None, "ink，a dog, ink"),
        (None, "a hat (red, blue)"),
        (None, ""),
    ]
    latents = [{} if variant is None else {keys.VARIANT_KEY: variant} for variant, _ in rows]
    conditioning = [entry(keys, caption) for _, caption in rows]
    assert pack.nodes.host.tag_counts(latents, conditioning) == {
        "ink": 3,
        "a cat": 2,
        "a dog": 1,
        "a hat (red, blue)": 1,
    }
    long = pack.nodes.host.tag_counts([{}], [entry(keys, "x" * 1000)])
    assert list(map(len, long)) == [201]


def test_conditionings_of_other_nodes_have_no_facts(pack):
    conditioning = [[[None, {"pooled_output": None}]]]
    assert pack.nodes.host.tag_counts([{}], conditioning) == {}
    assert pack.nodes.host.trigger_word(conditioning) == "" == pack.nodes.host.trigger_word([])


def test_the_trigger_and_the_tags_reach_the_file(pack, keys, parts, model, pictures, loras):
    latents, conditioning = pictures
    recorded = [
        [[encoded, {**more, keys.CAPTION_KEY: f"inkstyle, {name}", keys.TRIGGER: "inkstyle"}] for encoded, more in each]
        for each, name in zip(conditioning, ("a diamond", "a ball"), strict=True)
    ]
    report = trained(pack, model, latents, recorded, steps=2)[3]
    assert report.facts.trigger == "inkstyle"
    assert report.tags == {"inkstyle": 2, "a diamond": 1, "a ball": 1}
    lora_model = {f"{name}.lora_up.weight": torch.ones(6, 2) for name in report.layer_names()}
    lora_model |= {f"{name}.lora_down.weight": torch.ones(2, 5) for name in report.layer_names()}
    name = pack.nodes.adapter.save.ACLoRASave.execute(lora_model, "ink", rank_report=report)[0]
    table = pack.nodes.adapter.load.ACLoRALoad.execute(name)[3]
    assert '{"1_inkstyle": {"inkstyle": 2, "a diamond": 1, "a ball": 1}}' in table
    assert "Write 'inkstyle' in the prompt." in table
    shown = pack.nodes.adapter.save.ACLoRASave.execute(lora_model, "ink", trigger="inkstile", rank_report=report).ui
    assert "The trigger word is 'inkstile'; the training used 'inkstyle'." in shown.as_dict()["text"][0]
