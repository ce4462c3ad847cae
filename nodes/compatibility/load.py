"""Import the nodes, or raise an error that says what is missing."""

from __future__ import annotations

import logging
import re
from typing import Any

from .host_names import missing_names
from .templates import sort_templates, withhold_templates

log = logging.getLogger("aclora")

MINIMUM = "0.24.0"  # the oldest ComfyUI that has what the pack uses, and runs the quickstart (tests/other_hosts)


class HostError(RuntimeError):
    """This ComfyUI cannot run the pack; the message says why and what to do."""


def load_extension() -> Any:
    """Return the extension with the pack's nodes.

    Raises:
        HostError: this ComfyUI is too old, or it or its Python lacks something that the nodes import.
    """
    try:
        extension = _load(host_version())
    except HostError:
        withhold_templates()
        raise
    sort_templates()
    return extension


def _load(version: str) -> Any:
    if numbers(version) < numbers(MINIMUM):
        raise HostError(
            f"AC-LoRA needs ComfyUI {MINIMUM} or newer, and this is {version}: its nodes and templates are not loaded. "
            "Update ComfyUI and start it again."
        )
    missing = missing_names()
    try:
        from ..extension import ACLoRAExtension
    except (ImportError, AttributeError) as error:
        log.debug("AC-LoRA: the nodes could not be imported", exc_info=True)
        raise HostError(_reason(error, version, missing)) from error
    if missing:
        log.warning(
            "AC-LoRA: this ComfyUI (%s) lacks %s; what needs it will fail. Update AC-LoRA, or report it.",
            version,
            _listed(missing),
        )
    return ACLoRAExtension()


def host_version() -> str:
    """Return ComfyUI's version, such as 0.30.0; 0 where it does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "0"
    return str(__version__)


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparing."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _reason(error: Exception, version: str, missing: dict[str, list[str]]) -> str:
    """Return the sentence about nodes that could not be imported.

    Args:
        error: of the import.
        version: ComfyUI's.
        missing: names that ComfyUI lacks, with the files that use them.
    """
    if missing:
        return (
            f"AC-LoRA cannot run in this ComfyUI ({version}), which lacks {_listed(missing)}: its nodes and templates "
            "are not loaded. Update AC-LoRA, or report it."
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            f"AC-LoRA needs the Python package {error.name}: its nodes and templates are not loaded. Run ComfyUI's "
            "Python with -m pip install -r requirements.txt in AC-LoRA's folder, and start ComfyUI again."
        )
    return f"AC-LoRA's nodes and templates are not loaded: {error}. Install AC-LoRA again, or report it."


def _listed(missing: dict[str, list[str]]) -> str:
    """Return the missing names, with the first file that uses each."""
    return ", ".join(f"{name} (for {files[0]})" for name, files in missing.items())
