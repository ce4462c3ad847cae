"""Inputs that are set on the command line, and workflows that cannot be converted."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.settings import apply_settings
from launcher.workflow import WorkflowError, to_prompt
from workers.devices import NoGpuError, own_gpu

DEFINITIONS = {
    "Train": {"input": {"required": {"model": ["MODEL"], "steps": ["INT", {"default": 5}]}, "optional": {}}},
    "Cut": {"input": {"required": {"cut": ["COMFY_DYNAMICCOMBO_V3", {"options": []}]}}},
    "Curve": {"input": {"required": {"curve": ["CURVE", {}]}}},
}


def prompt() -> dict[str, Any]:
    return {
        "1": {"class_type": "Train", "inputs": {"steps": 5}, "_meta": {"title": "Train v1.5"}},
        "2": {"class_type": "Cut", "inputs": {"cut": "rank", "cut.rank": 4}, "_meta": {"title": "Cut"}},
        "4:1": {"class_type": "Cut", "inputs": {"cut": "rank", "cut.rank": 4}, "_meta": {"title": "Other"}},
    }


@pytest.mark.parametrize(
    ("setting", "node", "name", "value"),
    [
        ("1.steps=9", "1", "steps", 9),
        ("Train.steps=9", "1", "steps", 9),
        ("Train v1.5.steps=9", "1", "steps", 9),
        ("Other.cut.rank=8", "4:1", "cut.rank", 8),
        ("4:1.cut.rank=8", "4:1", "cut.rank", 8),
        ("2.cut=a = b", "2", "cut", "a = b"),
        ("2.cut=true", "2", "cut", True),
        ("2.cut=[1, 2]", "2", "cut", {"__value__": [1, 2]}),  # a bare list would be a link
        ("1.model=none", "1", "model", "none"),  # an input that the prompt leaves out
    ],
)
def test_a_setting_changes_one_input(setting: str, node: str, name: str, value: object) -> None:
    changed = prompt()
    apply_settings(changed, [setting], DEFINITIONS)
    expected = prompt()
    expected[node]["inputs"][name] = value
    assert changed == expected


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("steps=9", "'steps=9' is no setting. Write it as node.input=value"),
        ("1.steps", "'1.steps' is no setting"),
        ("9.steps=9", r"No node is called '9'. This workflow has 1 \(Train\), 2 \(Cut\), 4:1 \(Cut\)."),
        ("1.step=9", "The node '1' has no input 'step'. It has model, steps."),
        ("Cut.cut=fixed", "Several nodes are called 'Cut'. Name the one you mean by its id: 2, 4:1."),
    ],
)
def test_a_wrong_setting_is_explained(setting: str, sentence: str) -> None:
    with pytest.raises(WorkflowError, match=sentence):
        apply_settings(prompt(), [setting], DEFINITIONS)


def workflow(**node: Any) -> dict[str, Any]:
    return {"nodes": [{"id": 1, "mode": 0, "inputs": [], "outputs": [], "widgets_values": [], **node}], "links": []}


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ({"nothing": 1}, "This file is no workflow of ComfyUI"),
        (
            workflow(type="Missing"),
            r"The node 'Missing' \(1\) is of the type 'Missing', which this ComfyUI does not have",
        ),
        (workflow(type="workflow>mine"), "is a group node of an older front end"),
        (workflow(type="CustomCombo"), "is of the type 'CustomCombo'"),
        (
            workflow(type="Curve", inputs=[{"name": "curve", "type": "CURVE", "widget": {"name": "curve"}}]),
            r"The widget 'curve' of the node 'Curve' \(1\) is known to the browser only.*Export \(API\)",
        ),
    ],
)
def test_what_only_the_browser_knows_is_refused(file: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WorkflowError, match=sentence):
        to_prompt(file, DEFINITIONS)


def test_a_missing_value_is_the_default_and_a_prompt_stays_as_it_is() -> None:
    assert to_prompt(workflow(type="Train"), DEFINITIONS)["1"]["inputs"] == {"steps": 5}
    assert to_prompt(prompt(), DEFINITIONS) == prompt()


def test_a_muted_node_that_is_not_installed_does_no_harm() -> None:
    assert to_prompt(workflow(type="Missing", mode=2), DEFINITIONS) == {}


@pytest.mark.parametrize(
    ("rank", "visible", "gpu"), [(0, "", "0"), (1, "", "1"), (1, "2,5", "5"), (0, "GPU-4f,GPU-5a", "GPU-4f")]
)
def test_every_process_of_a_machine_has_a_gpu_of_its_own(rank: int, visible: str, gpu: str) -> None:
    assert own_gpu(rank, visible) == gpu


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(NoGpuError, match="There is no GPU for process 2 of this machine: 1 may be used."):
        own_gpu(1, "3")
