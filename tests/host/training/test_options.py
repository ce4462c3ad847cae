"""The options nodes: together they cover every setting of a training."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest

KINDS = ("learning", "layers", "ranks", "validation", "speed")
CONNECTED = {"mode": "paper", "held_out": 0.2}  # connecting these nodes switches restarts and validation on


def node_of(pack: ModuleType, kind: str) -> Any:
    module = getattr(pack.nodes.training.options, kind)
    return next(value for name, value in vars(module).items() if name.startswith("ACLoRA"))


def widgets(node: Any) -> dict[str, Any]:
    """Return the defaults of a node's widgets."""
    return {each.id: each.default for each in node.define_schema().inputs if hasattr(each, "default")}


def test_every_setting_is_on_one_node_with_its_default(pack: ModuleType) -> None:
    config = pack.aclora_core.config.train_config.TrainConfig
    nodes = [pack.nodes.training.node.ACLoRATrain, *(node_of(pack, kind) for kind in KINDS)]
    found = [item for node in nodes for item in widgets(node).items()]
    assert len(found) == len(dict(found)), "a setting is on two nodes"
    settings = {field.name: field.default for field in fields(config) if field.name != "text_learning"}
    assert CONNECTED.items().isdisjoint(settings.items())
    # Which of its steps a training gives, and where it runs, is no setting of it, and a preset stands for others.
    assert dict(found) == {**settings, **CONNECTED, "step": 0, "preset": "off", "gpus": "1"}


@pytest.mark.parametrize("kind", KINDS)
def test_chained_options_are_merged_and_inputs_unchanged(pack: ModuleType, kind: str) -> None:
    options_class = pack.nodes.training.options.options.Options
    node = node_of(pack, kind)
    name, default = next(iter(widgets(node).items()))
    before = options_class({"steps": 5, name: "earlier"}, previews="kept")
    after = node.execute(before, **widgets(node)).result[0]
    own = {key: value for key, value in widgets(node).items() if key not in ("preset", "gpus")}
    assert after.settings == {"steps": 5, **own} and after.settings[name] == default
    assert after.previews == "kept" and before.settings == {"steps": 5, name: "earlier"}


def test_the_text_encoder_node_enables_its_training(pack: ModuleType) -> None:
    before = pack.nodes.training.options.options.Options({"alpha": 2.0})
    node = pack.nodes.training.options.text_encoder.ACLoRATextEncoderOptions
    after = node.execute("the clip", options=before, **widgets(node)).result[0]
    assert after.clip == "the clip" and after.settings == {"alpha": 2.0, "text_learning": 0.2}


def test_the_unconditional_passes_along_the_chain(pack: ModuleType) -> None:
    node = node_of(pack, "learning")
    given = node.execute(unconditional="the empty caption", **widgets(node)).result[0]
    later = node.execute(given, **widgets(node)).result[0]
    ranks = node_of(pack, "ranks")
    last = ranks.execute(later, **widgets(ranks)).result[0]
    assert given.unconditional == last.unconditional == "the empty caption"
    assert node.execute(**widgets(node)).result[0].unconditional is None


def test_the_preset_passes_along_the_chain_until_another_is_chosen(pack: ModuleType) -> None:
    node, ranks = node_of(pack, "learning"), node_of(pack, "ranks")
    few = node.execute(**{**widgets(node), "preset": "few images"}).result[0]
    assert ranks.execute(few, **widgets(ranks)).result[0].preset == "few images"
    assert node.execute(few, **widgets(node)).result[0].preset == "few images"
    assert node.execute(few, **{**widgets(node), "preset": "usual"}).result[0].preset == "usual"


def test_the_number_of_gpus_passes_along_the_chain(pack: ModuleType) -> None:
    node, ranks = node_of(pack, "speed"), node_of(pack, "ranks")
    two = node.execute(**{**widgets(node), "gpus": "2"}).result[0]
    assert ranks.execute(two, **widgets(ranks)).result[0].gpus == "2"
    assert node.execute(**{**widgets(node), "gpus": "all"}).result[0].gpus == "all"
    assert ranks.execute(**widgets(ranks)).result[0].gpus == "1"


def test_checkpoints_and_previews_pass_settings_on(pack: ModuleType) -> None:
    before = pack.nodes.training.options.options.Options({"alpha": 2.0})
    given = pack.nodes.training.options.checkpoints.ACLoRACheckpointOptions.execute(
        checkpoint_every=9, checkpoint_name="ink", checkpoint_keep=3, resume="never", options=before
    ).result[0]
    assert given.settings == {"alpha": 2.0} and given.checkpoints.folder.parts[-2:] == ("aclora_checkpoints", "ink")
    assert (given.checkpoints.every, given.checkpoints.keep, given.checkpoints.resume) == (9, 3, "never")


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        (
            "layers",
            {"include_layers": "attn\n(unclosed"},
            "^include_layers: .*'.unclosed' is not a valid regular expression",
        ),
        ("layers", {"include_layers": "attn", "exclude_layers": "("}, "^exclude_layers: "),
        ("layers", {"layer_ranks": "attn"}, "^layer_ranks: A line of layer_ranks must be pattern=rank"),
        ("ranks", {"lowest_threshold": 0.9, "highest_threshold": 0.5}, "^lowest_threshold must be .* is 0.9 to 0.5"),
    ],
)
def test_invalid_options_are_refused_by_their_node_and_name_one_input(
    pack: ModuleType, kind: str, given: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        node_of(pack, kind).execute(**given)


def test_too_many_prompts_are_refused_when_queued(pack: ModuleType) -> None:
    assert "has 9 lines" in node_of(pack, "previews").validate_inputs("a cat\n" * 9)


@pytest.mark.parametrize("given", [None, "", "\n", "a cat"])  # None: linked, its value is not known yet
def test_valid_prompts_are_queued_and_none_where_previews_may_be_off(pack: ModuleType, given: Any) -> None:
    assert node_of(pack, "previews").validate_inputs(given) is True
