"""The Python that runs ComfyUI: our own virtual environment, or that of a ComfyUI that was installed before.

A stamp file records what has been installed, so that the next start has nothing to do.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.console import StepError, run_step

ROOT = Path(__file__).resolve().parents[1]  # the checkout
RUNTIME = ROOT / ".runtime"  # everything that run.py makes
LOGS = RUNTIME / "logs"
VENV = RUNTIME / "venv"

# Known to run ComfyUI 0.30.0. Installed in our own environment only; the torch of another is never touched.
TORCH = ("torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.1")
DISK_NEEDED = 9 * 1024**3

INSTALL_HINT = (
    "Read the lines above: most often the network failed or the disk is full. Then run the same command again;\n"
    "it continues where it stopped. Python 3.11 to 3.13 are known to have all packages; this is Python "
    f"{sys.version_info.major}.{sys.version_info.minor}."
)


def venv_python(venv: Path) -> Path:
    """Return the path of a virtual environment's Python on this system."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path = VENV) -> Path:
    """Make a virtual environment, ours unless told otherwise, if no working one exists; return its Python."""
    python = venv_python(venv)
    if works(python, "import pip"):
        return python
    run_step(
        "Making a virtual environment",
        [sys.executable, "-m", "venv", "--clear", venv],
        LOGS / "install.log",
        "On Debian and Ubuntu: sudo apt install python3-venv. Then run the same command again.",
    )
    return python


def works(python: Path, code: str) -> bool:
    """Return whether this Python exists and runs the code."""
    try:
        result = subprocess.run([str(python), "-c", code], capture_output=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def other_python(host: Path) -> Path:
    """Return the Python of a ComfyUI that we did not install.

    The order is ACLORA_PYTHON, its own environment, the Python that runs this.

    Raises:
        StepError: it lacks packages that ComfyUI needs.
    """
    named = os.environ.get("ACLORA_PYTHON")
    beside = [venv_python(host / name) for name in ("venv", ".venv")]
    beside += [host.parent / "python_embeded" / "python.exe", venv_python(host.parent / "venv")]
    found = [python for python in beside if python.is_file()]
    python = Path(named) if named else (found or [Path(sys.executable)])[0]
    if not works(python, "import torch, aiohttp, safetensors"):
        raise StepError(
            "Finding ComfyUI's Python",
            f"{python} cannot import what the ComfyUI in {host} needs (torch, aiohttp, safetensors).",
            "Set ACLORA_PYTHON to the Python that you start this ComfyUI with.",
        )
    return python


def has_cuda(python: Path) -> bool:
    """Return whether this Python's torch can use an NVIDIA GPU."""
    return works(python, "import sys, torch; sys.exit(not torch.cuda.is_available())")


def install(
    name: str, python: Path, packages: Sequence[str], files: Sequence[Path], stamps: Path, note: str = ""
) -> None:
    """Install packages and requirement files once; do nothing if the stamp is up to date.

    The stamp holds the packages, the text of the files and the Python, so a change in any of them installs again.
    """
    wanted = "\n".join([str(python), *packages, *(file.read_text(encoding="utf-8") for file in files)])
    stamp = stamps / f"aclora-{name.replace(' ', '-')}.stamp"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == digest:
        return
    stamps.mkdir(parents=True, exist_ok=True)
    if packages:
        check_disk(python)
    command: list[str | Path] = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += packages
    for file in files:
        command += ["-r", file]
    run_step(f"Installing {name}{note}", command, LOGS / "install.log", INSTALL_HINT)
    stamp.write_text(digest + "\n", encoding="utf-8")


def check_disk(python: Path) -> None:
    """Raise StepError before a download of torch that the disk has no room for."""
    free = shutil.disk_usage(RUNTIME).free
    if free < DISK_NEEDED and not works(python, "import torch"):
        raise StepError(
            "Installing ComfyUI's packages",
            f"{free / 1024**3:.1f} GB are free for {RUNTIME}; about {DISK_NEEDED / 1024**3:.0f} GB are needed.",
            "Make room, or move the checkout to a larger disk, and run the same command again.",
        )
