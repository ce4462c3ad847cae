"""The prompts that bench.memory.server runs: a training of this pack and one of ComfyUI's, with equal inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.step_time.models import Case
from launcher.workflow import Prompt, to_prompt

TRAINERS = "ACLoRATrain", "TrainLoraNode"
RANK = 16


def ours(definitions: Mapping[str, Any], file: str, case: Case, steps: int) -> Prompt:
    """Return a prompt that trains with this pack's node, at its defaults but for batch size and rank."""
    trainer = defaults(definitions, "ACLoRATrain") | {"steps": steps, "batch_size": 1, "max_rank": RANK}
    return _training("ACLoRATrain", trainer | {"conditioning": ["2", 1]}, file, case)


def native(definitions: Mapping[str, Any], file: str, case: Case, steps: int, mode: Mapping[str, Any]) -> Prompt:
    """Return a prompt that trains with ComfyUI's own node, at its defaults but for the mode."""
    trainer = defaults(definitions, "TrainLoraNode") | {"steps": steps, "rank": RANK, "existing_lora": "[None]"}
    return _training("TrainLoraNode", trainer | {"positive": ["2", 1], **mode}, file, case)


def from_workflow(definitions: Mapping[str, Any], workflow: Path, steps: int) -> Prompt:
    """Return a workflow of this pack in the API form, with so many steps of one image, and drawing cut short."""
    prompt = to_prompt(json.loads(workflow.read_text(encoding="utf-8")), definitions)
    for node in prompt.values():
        if node["class_type"] == "ACLoRATrain":
            node["inputs"] |= {"steps": steps, "batch_size": 1, "max_rank": RANK}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 4
    return prompt


def defaults(definitions: Mapping[str, Any], node: str) -> dict[str, Any]:
    """Return the inputs of a node that have a default, with it."""
    groups = definitions[node]["input"]
    known = {**groups.get("required", {}), **groups.get("optional", {})}
    return {name: spec[1]["default"] for name, spec in known.items() if len(spec) > 1 and "default" in spec[1]}


def _training(trainer: str, inputs: dict[str, Any], file: str, case: Case) -> Prompt:
    losses = {"ACLoRATrain": 2, "TrainLoraNode": 1}[trainer]  # the output that LossGraphNode takes
    channels, height, width = case.latent
    sizes = {"channels": channels, "height": height, "width": width, "tokens": case.text[0]}
    sizes |= {"text_width": case.text[1], "pooled_width": case.pooled or 0, "frames": int(case.video)}
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}},
        "2": {"class_type": "RandomTrainingInputs", "inputs": sizes},
        "3": {"class_type": trainer, "inputs": {**inputs, "model": ["1", 0], "latents": ["2", 0]}},
        "4": {"class_type": "LossGraphNode", "inputs": {"loss": ["3", losses], "filename_prefix": "loss"}},
    }
