"""A ComfyUI that cannot run the pack is told so in one sentence, and no node is loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tomllib

from launcher.environment import ROOT
from launcher.other_hosts import OLDEST


@pytest.fixture
def compatibility(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """nodes/compatibility; the nodes are imported anew."""
    monkeypatch.delitem(sys.modules, f"{pack.__name__}.nodes.extension")
    return pack.nodes.compatibility


@pytest.mark.parametrize("version", ["0.3.64", "0.23.9", "0.9"])
def test_an_older_comfyui_is_refused_in_one_sentence(
    compatibility: ModuleType, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comfyui_version.__version__", version)
    with pytest.raises(RuntimeError) as refusal:
        compatibility.load_extension()
    assert str(refusal.value) == (
        f"AC-LoRA needs ComfyUI {compatibility.MINIMUM} or newer, and this is {version}: its nodes and templates are "
        "not loaded. Update ComfyUI and start it again."
    )


@pytest.mark.parametrize("version", ["0.24.0", "0.24.1", "0.30.0", "1.0", "0.100.2"])
def test_others_are_not(compatibility: ModuleType, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfyui_version.__version__", version)
    assert type(compatibility.load_extension()).__name__ == "ACLoRAExtension"


def test_a_name_that_the_nodes_import_is_named(
    pack: ModuleType, compatibility: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"{pack.__name__}.nodes.host.conditioning_lengths")
    monkeypatch.delattr("comfy.conds.CONDCrossAttn")
    start = f"{pack.__name__}.nodes."
    names = [name for name in sys.modules if name.startswith(start) and ".compatibility" not in name]
    for parent, _, child in [name.rpartition(".") for name in names]:
        if hasattr(sys.modules[parent], child):  # which importing it anew replaces
            monkeypatch.setattr(sys.modules[parent], child, getattr(sys.modules[parent], child))
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        RuntimeError, match=r"lacks comfy.conds.CONDCrossAttn \(for nodes/host/conditioning_lengths.py\)"
    ):
        compatibility.load_extension()


def test_a_python_package_that_is_missing_is_named(compatibility: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = f"{compatibility.__name__.removesuffix('.compatibility')}.extension"
    monkeypatch.setitem(sys.modules, extension, None)  # importing it raises ModuleNotFoundError
    with pytest.raises(RuntimeError, match="needs the Python package .*pip install -r requirements.txt"):
        compatibility.load_extension()


def test_templates_of_the_pack_alone_are_withheld(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "any-name").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("folder_paths.get_folder_paths", lambda kind: [str(tmp_path)])
    offered = {"any-name": ["2", "1"], "other": ["b", "a"]}
    templates = pack.nodes.compatibility.templates
    assert templates.without_own(offered) == {"other": ["b", "a"]}
    assert templates.with_own_sorted(offered) == {"any-name": ["1", "2"], "other": ["b", "a"]}


def test_all_places_name_the_same_oldest_version(pack: ModuleType) -> None:
    minimum = pack.nodes.compatibility.MINIMUM
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    script = (ROOT / "nodes" / "web" / "missing_nodes.js").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert minimum == OLDEST
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={minimum}"
    assert re.findall(r'MINIMUM = "([^"]+)"', script) == [minimum]
    assert f"ComfyUI {minimum.removesuffix('.0')} or newer" in readme


def test_comfyui_reads_what_pyproject_says(pack: ModuleType) -> None:
    from comfy_config.config_parser import extract_node_configuration

    found = extract_node_configuration(str(ROOT))
    assert (found.project.name, found.tool_comfy.display_name) == ("aclora", "AC-LoRA")
    assert found.project.supported_comfyui_version == f">={pack.nodes.compatibility.MINIMUM}"
    assert found.project.supported_os == ["OS Independent"]
    assert found.project.supported_accelerators == ["GPU :: NVIDIA CUDA"]  # one unknown word empties the list
    assert found.project.urls.repository and found.project.urls.issues and found.project.urls.documentation
    assert found.tool_comfy.publisher_id and found.tool_comfy.icon.endswith(".png")
    assert found.project.license.text == "Apache-2.0"
