"""The settings of the workflow quickstart."""

from __future__ import annotations

import json
from typing import Any

from launcher.environment import ROOT

PROMPT = ROOT / "tests" / "prompts" / "quickstart.json"


def quickstart_settings() -> dict[str, Any]:
    """Return the widgets of the quickstart's training node, and under "dataset" those of its dataset node."""
    prompt = json.loads(PROMPT.read_text(encoding="utf-8")).values()

    def widgets(kind: str) -> dict[str, Any]:
        inputs = next(node["inputs"] for node in prompt if node["class_type"] == kind)
        return {name: value for name, value in inputs.items() if not isinstance(value, list)}

    return {**widgets("ACLoRATrain"), "dataset": widgets("ACLoRADataset")}
