"""The modules in which ComfyUI defines its networks, which not every version has."""

from __future__ import annotations

import importlib
from typing import Any


def network_module(name: str) -> Any:
    """Return a module of ComfyUI's networks, such as flux.layers; None where this version has none of the name."""
    try:
        return importlib.import_module(f"comfy.ldm.{name}")
    except ImportError:
        return None
