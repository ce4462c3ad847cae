"""The pack as the registry offers it: the files in git without those of .comfyignore."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from launcher.environment import ROOT


def published_files() -> list[str]:
    """Return the paths of the files that the registry's archive holds."""
    pathspec = pytest.importorskip(
        "pathspec", reason="pathspec is not installed: pip install -r tests/requirements.txt"
    )
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    spec = pathspec.PathSpec.from_lines("gitignore", lines)
    return [name for name in listed.stdout.splitlines() if not spec.match_file(name) and (ROOT / name).is_file()]


def write_archive(path: Path) -> None:
    """Write the archive that the registry's tool would upload."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in published_files():
            archive.write(ROOT / name, name)


def install_published(folder: Path) -> None:
    """Copy the archive's files into a folder, as ComfyUI-Manager unpacks them."""
    for name in published_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
