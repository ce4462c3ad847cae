"""Any value of any type in a text input of a node is refused with a sentence, or used inside the allowed folders.

The values go through ComfyUI's own validation, as those of a prompt that was sent to its server.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import fuzz

TEXTS = ("STRING", "COMBO")
NAMES = {"ACLoRACheckpointOptions": "checkpoint_name", "ACLoRASave": "filename"}  # of what is written

HOSTILE: list[Any] = [
    "",
    " ",
    ".",
    "..",
    "/",
    "\\",
    "/etc/passwd",
    "/etc/x",
    "~",
    "~/x",
    "~nobody/x",
    "~no such user/x",
    "$HOME/x",
    "%TEMP%\\x",
    "../x",
    "a/../../x",
    "a/..",
    "..\\..\\x",
    "C:\\x",
    "c:x",
    "\\\\server\\share\\x",
    "//server/share/x",
    "\\\\?\\C:\\x",
    "file:///etc/passwd",
    "x/",
    "x//y",
    "x/./y",
    ".x",
    "x.",
    "x ",
    "con",
    "CON.txt",
    "con .txt",
    "nul.safetensors",
    "COM1",
    "COM¹",
    "lpt³.x",
    "CONIN$",
    "conout$.x",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a:b",
    "a|b",
    "\ud800",
    "x\udfff/y",
    "\u202ex",
    "墨/筆",
    "墨" * 100,
    "x" * 300,
    "x" * 5000,
    "/".join("x" * 1000),
    "/".join(["x" * 150] * 30),
    "datasets: ../x",
    "datasets: /etc",
    "example: ../../..",
    "[[label|https://example.org]]",
    "%date:yyyy-MM-dd%",
    "(((",
    "a{99999999999}",
    "(" * 2000,
    "a=" + "9" * 5000,
    None,
    True,
    0,
    -1,
    10**30,
    0.5,
    float("nan"),
    {},
    {"key": "value"},
    {"__value__": None},
    {"__value__": ["a", "b"]},
    {"__value__": ["a", 0, {}]},
]
PIECES = [
    "..",
    ".",
    "/",
    "\\",
    "~",
    "a",
    "ink",
    "con",
    " ",
    "\0",
    "\ud83d",
    "é",
    "e\u0301",
    ":",
    "C:",
    "*",
    "{",
    "}",
    "\n",
]


def made_up(count: int) -> Iterator[str]:
    chance = fuzz.chance(18)
    for _ in range(count):
        yield "".join(chance.choices(PIECES, k=chance.randrange(1, 12)))


@pytest.fixture(scope="module")
def registered(pack: ModuleType) -> Iterator[dict[str, Any]]:
    """The nodes by id, known to ComfyUI as those of its own."""
    import nodes

    async def ask() -> list[Any]:
        return list(await (await pack.comfy_entrypoint()).get_node_list())

    ours = {node.GET_SCHEMA().node_id: node for node in asyncio.run(ask())}
    nodes.NODE_CLASS_MAPPINGS.update(ours)
    yield ours
    for node_id in ours:
        del nodes.NODE_CLASS_MAPPINGS[node_id]


def text_inputs(node: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the defaults of a node's widgets, and the names of its text inputs."""
    defaults, texts = {}, []
    for group in node.GET_NODE_INFO_V1()["input"].values():
        for name, spec in group.items():
            kind, facts = (spec[0], spec[1] if len(spec) > 1 else {}) if isinstance(spec, list | tuple) else (spec, {})
            if isinstance(facts, dict) and "default" in facts:
                defaults[name] = facts["default"]
            if kind in TEXTS or isinstance(kind, list):
                texts.append(name)
    return defaults, texts


def validated(node_id: str, inputs: dict[str, Any]) -> tuple[bool, list[dict[str, Any]], dict[str, Any]]:
    """Return whether ComfyUI accepts these inputs, its errors, and the inputs as it would hand them on."""
    import execution

    prompt = {"1": {"class_type": node_id, "inputs": dict(inputs)}}
    ok, errors, _ = asyncio.run(execution.validate_inputs("id", prompt, "1", {}, []))
    return ok, errors, prompt["1"]["inputs"]


IDS = [
    "ACLoRACheckpointOptions",
    "ACLoRADataset",
    "ACLoRAEvaluate",
    "ACLoRAInspect",
    "ACLoRALayerOptions",
    "ACLoRALearningOptions",
    "ACLoRALoad",
    "ACLoRAPreviewOptions",
    "ACLoRARankOptions",
    "ACLoRAResize",
    "ACLoRASave",
    "ACLoRASpeedOptions",
    "ACLoRATextEncoderOptions",
    "ACLoRATinyBase",
    "ACLoRATrain",
    "ACLoRAValidationOptions",
]


def test_all_nodes_are_tried(registered: dict[str, Any]) -> None:
    assert sorted(registered) == IDS


@pytest.mark.parametrize("node_id", IDS)
def test_no_value_of_a_text_input_is_an_exception(registered: dict[str, Any], node_id: str) -> None:
    defaults, texts = text_inputs(registered[node_id])
    for name in texts:
        for value in [*HOSTILE, *made_up(40)]:
            _, errors, _ = validated(node_id, {**defaults, name: value})
            told = json.dumps(errors, default=str)
            assert "Traceback" not in told and "Error(" not in told, (name, value)


def inside(path: Path, folder: str) -> bool:
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real.startswith(root + os.sep)


@pytest.mark.parametrize("node_id", NAMES)
def test_a_name_that_is_accepted_lies_inside_its_folder(
    pack: ModuleType, registered: dict[str, Any], node_id: str
) -> None:
    import folder_paths

    root = Path(folder_paths.models_dir, "aclora_checkpoints")
    resolve = pack.nodes.training.options.checkpoint_folder.resolve_checkpoint_folder
    if node_id == "ACLoRASave":
        root, save = Path(folder_paths.get_folder_paths("loras")[0]), pack.nodes.adapter.save
        resolve = lambda name: save.output_path(save.with_dates(name))[1]  # noqa: E731
    defaults, _ = text_inputs(registered[node_id])
    accepted, refused = [], []
    for value in [*HOSTILE, *made_up(400)]:
        _, errors, inputs = validated(node_id, {**defaults, NAMES[node_id]: value})
        name = inputs[NAMES[node_id]]
        about = [it["details"] for it in errors if it["type"] == "custom_validation_failed"]
        if about:
            refused.append(value)
            assert all(sentence.endswith(".") and len(sentence) < 500 for sentence in about), value
            assert all(sentence.isprintable() for sentence in about), value
            with pytest.raises(ValueError):
                resolve(name)  # as when the name comes by a link
        else:
            accepted.append(value)
            assert inside(resolve(name), str(root)), value
    assert {"墨/筆", "[[label|https://example.org]]"} & set(map(str, accepted)) == {"墨/筆"}
    assert {"COM¹", "CONIN$", "con .txt", "/etc/x", "../x", "\ud800"} <= set(map(str, refused))


@pytest.mark.parametrize("name", ["ink", "styles/ink", "墨", "v1.5 ink"])
def test_good_names_are_accepted(registered: dict[str, Any], name: str) -> None:
    for node_id, input_name in NAMES.items():
        defaults, _ = text_inputs(registered[node_id])
        _, errors, _ = validated(node_id, {**defaults, input_name: name})
        assert not [it for it in errors if it["type"] == "custom_validation_failed"]


def test_checkpoints_on_another_drive_need_a_registered_folder(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    resolve = pack.nodes.training.options.checkpoint_folder.resolve_checkpoint_folder
    with pytest.raises(ValueError, match="register a folder on it as aclora_checkpoints in extra_model_paths.yaml"):
        resolve(str(tmp_path / "big" / "ink"))
    roots = tmp_path / "big", tmp_path / "old"
    (roots[1] / "known").mkdir(parents=True)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "aclora_checkpoints", ([str(root) for root in roots], set())
    )
    assert resolve("ink") == roots[0] / "ink" and resolve("known") == roots[1] / "known"
    (tmp_path / "elsewhere").mkdir()
    roots[0].mkdir()
    (roots[0] / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads outside models/aclora_checkpoints through a link"):
        resolve("linked/ink")


def test_a_name_is_shown_short_and_printable(pack: ModuleType) -> None:
    shown = pack.nodes.paths.shown
    assert shown("墨 ink") == "墨 ink" and shown("a\nb\ud800") == "a\\nb\\ud800"
    assert len(shown("x" * 5000)) == 80 and shown("x" * 5000).endswith("x…")


LISTS: list[Any] = [[], ["a"], [["1", 0]]]  # two values would be a link
PARTS = {"ACLoRALoad": ("cut", "rank", "cut.rank"), "ACLoRAResize": ("rule", "energy", "rule.keep")}


@pytest.mark.parametrize("node_id", IDS)
def test_no_value_of_another_input_is_an_exception(registered: dict[str, Any], node_id: str) -> None:
    """Values of wrong types in numbers, switches and choices with inputs of their own, and inputs that are missing."""
    defaults, texts = text_inputs(registered[node_id])
    choice, option, part = PARTS.get(node_id, ("", "", ""))
    defaults |= {choice: option, part: 1} if choice else {}
    names = [name for name in defaults if name not in texts]
    tried = [
        {**defaults, name: value} for name in names for value in [*HOSTILE, *LISTS, float("inf"), "nan", "9" * 5000]
    ]
    tried += [{other: defaults[other] for other in defaults if other != name} for name in defaults]
    for inputs in [*tried, {}]:
        _, errors, _ = validated(node_id, inputs)
        told = json.dumps(errors, default=str)
        assert "Traceback" not in told and "exception_during" not in told, inputs
