"""Paths, versions and links in the documents are those of the checkout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.environment import ROOT

HELP = ROOT / "nodes" / "web" / "docs"
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(HELP.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md", "tests/compatibility/README.md")),
]
FOLDERS = ("aclora_core", "bench", "docs", "launcher", "nodes", "tests", "tools", "workers", "workflows")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def links(text: str) -> set[str]:
    """The relative targets of links and images."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return {target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")}


def named_paths(text: str) -> set[str]:
    """The paths of the checkout that a text names in backticks."""
    quoted = re.findall(r"`([\w./*-]+)`", text)
    return {path.rstrip("/") for path in quoted if "/" in path and path.partition("/")[0] in FOLDERS}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files(page: Path) -> None:
    missing = sorted(
        target for target in links(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()
    )
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_and_folders_are_there(page: Path) -> None:
    paths = named_paths(page.read_text(encoding="utf-8"))
    assert not sorted(path for path in paths if not list(ROOT.glob(path)))


def test_images_that_help_pages_share_with_the_documents_are_the_same() -> None:
    """ComfyUI serves the folder of the help pages alone, so they have copies."""
    copies = {path: ROOT / "docs" / "images" / path.name for path in (HELP / "images").iterdir()}
    shared = {copy: image for copy, image in copies.items() if image.exists()}
    assert shared
    assert not [copy.name for copy, image in shared.items() if copy.read_bytes() != image.read_bytes()]


def test_rooms_of_the_architecture_page_are_those_of_the_core() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "aclora_core").iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == rooms


def test_citation_has_the_version_of_the_pack() -> None:
    versions = set()
    for name, pattern in (("pyproject.toml", r'^version = "(.+)"$'), ("CITATION.cff", r"^version: (.+)$")):
        versions |= set(re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
    assert len(versions) == 1
