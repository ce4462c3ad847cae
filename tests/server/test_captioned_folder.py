"""The workflow caption_my_folder, with a given text in place of the model that writes one."""

from __future__ import annotations

import json
import shutil

import pytest

from launcher.environment import ROOT
from tests.support.dataset_calls import draw
from tests.support.host_server import HostServer


@pytest.mark.slow
def test_what_it_saves_is_a_dataset_whose_captions_can_be_edited(server: HostServer) -> None:
    prompt = json.loads((ROOT / "tests" / "prompts" / "caption_my_folder.json").read_text(encoding="utf-8"))
    (writer,) = (node_id for node_id, node in prompt.items() if node["class_type"] == "TextGenerate")
    prompt[writer] = server.node("PrimitiveString", value="eine Größe")
    source, made = server.base / "input" / "my_style", server.base / "output" / "datasets" / "my_style"
    for number in range(3):
        draw(source / f"{number}.png", number)
    (saver,) = (node for node in prompt.values() if node["class_type"] == "SaveImageTextDataSetToFolder")
    saver["inputs"]["texts"] = ["all", 0]
    inputs = {f"inputs.input{number}": [writer, 0] for number in range(3)}
    prompt["all"] = {"class_type": "CreateList", "inputs": inputs}
    try:
        server.run(prompt)
        options = server.get_json("/object_info/ACLoRADataset")["ACLoRADataset"]["input"]["required"]["folder"]
        assert "output: my_style" in options[1]["options"]
        found = server.get_json("/aclora/dataset?folder=output:%20my_style&resolution=64")
        assert [each["text"] for each in found["images"]] == ["eine Größe"] * 3 and found["read_only"] == ""
        assert len(list(made.iterdir())) == 6
    finally:
        shutil.rmtree(source)
        shutil.rmtree(made, ignore_errors=True)
