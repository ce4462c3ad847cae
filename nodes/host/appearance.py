"""How the user's ComfyUI looks, so that what the pack draws fits to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths

_SETTINGS = ("default", "comfy.settings.json")  # in the folder of users; several users have folders of other names


def dark_theme() -> bool:
    """Return whether ComfyUI's colour palette is a dark one, as it is unless the user has chosen another."""
    settings = _settings()
    chosen = str(settings.get("Comfy.ColorPalette", "dark"))
    if chosen == "light":
        return False
    own = settings.get("Comfy.CustomColorPalettes")
    palette = own.get(chosen.removeprefix("custom_")) if isinstance(own, dict) else None
    return not (isinstance(palette, dict) and palette.get("light_theme"))


def _settings() -> dict[str, Any]:
    """Return the settings of the front end, which the server keeps; none where they cannot be read."""
    try:
        found = json.loads(Path(folder_paths.get_user_directory(), *_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
