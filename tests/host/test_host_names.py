"""What the pack uses of ComfyUI stands in one list, and all of it is there."""

from __future__ import annotations

import json
import logging
from types import ModuleType
from typing import Any

import pytest

from tools.host_names import LIST, host_names


def test_the_list_is_what_the_source_uses() -> None:
    assert json.loads(LIST.read_text(encoding="utf-8")) == host_names(), "run python -m tools.host_names"


def test_this_comfyui_has_every_name(pack: ModuleType) -> None:
    assert pack.nodes.compatibility.host_names.missing_names() == {}


@pytest.mark.parametrize(
    ("module", "name", "listed"),
    [
        ("comfy.samplers", "calculate_sigmas", "comfy.samplers.calculate_sigmas"),
        ("comfy.ldm.flux.math", "_apply_rope1", "comfy.ldm.flux.math._apply_rope1"),
        ("comfy_api.latest", "ui", "comfy_api.latest.ui.PreviewImage"),
    ],
)
def test_a_name_that_is_gone_is_found(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str, name: str, listed: str
) -> None:
    monkeypatch.delattr(f"{module}.{name}")
    assert listed in pack.nodes.compatibility.host_names.missing_names()


def test_an_attribute_that_objects_no_longer_get_is_found(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed:
        def __init__(self) -> None:
            self.other = 1

    monkeypatch.setattr("comfy.sd.VAE", Renamed)
    missing = pack.nodes.compatibility.host_names.missing_names()
    assert missing["comfy.sd.VAE.vae_dtype"] == ["nodes/host/preview_sampling.py"]


def test_a_newer_comfyui_without_a_name_is_told_by_that_name(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("comfy.samplers.calculate_sigmas")
    with caplog.at_level(logging.WARNING, logger="aclora"):
        extension: Any = pack.nodes.compatibility.load_extension()
    assert type(extension).__name__ == "ACLoRAExtension"  # the rest works
    (line,) = caplog.messages
    assert "lacks comfy.samplers.calculate_sigmas (for nodes/host/preview_sampling.py)" in line
