#!/usr/bin/env python3
"""Try AC-LoRA with one command.

    python3 run.py quickstart        learn a style from 24 images and draw with it
    python3 run.py serve             start ComfyUI with the pack in it and print the address
    python3 run.py train WORKFLOW.json [--set node.input=value ...] [-- OPTIONS of ComfyUI]
                                     run a workflow without a server or a screen
    python3 run.py test [OPTIONS]    run every check and test; the options go to pytest

The first start installs what is missing into the folder .runtime of this checkout; later starts take seconds.

The ComfyUI is the folder in COMFYUI_PATH, or the one whose custom_nodes holds this checkout, or else one of its own in
.runtime. A ComfyUI that was installed before runs with the Python in ACLORA_PYTHON, or with its own environment (venv,
.venv, python_embeded), or else with the Python that runs this file; its torch is never touched.

Needs Python 3.11 or newer and nothing but the standard library.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit(f"AC-LoRA's run.py needs Python 3.11 or newer; this is {sys.version.split()[0]}. Try: python3.11 run.py")

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from launcher.console import Step, StepError, clock, say
from launcher.environment import LOGS, ROOT, RUNTIME, has_cuda
from launcher.host import Host, link_pack, prepare
from launcher.server import Server

CHECKOUT = Path(__file__).absolute().parent  # not resolved: a link in custom_nodes tells which ComfyUI is meant
PROMPT = ROOT / "tests" / "prompts" / "quickstart.json"
OUTPUT = RUNTIME / "output"


def main() -> int:
    """Run the command. Return 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="quickstart | serve | train | test")
    commands.add_parser("quickstart", help="learn a style from 24 images and draw with it")
    serving = commands.add_parser("serve", help="start ComfyUI with the pack in it")
    serving.add_argument("--port", type=int, default=8188, help="wanted port; another is taken when it is in use")
    commands.add_parser("test", help="run every check and test", add_help=False)
    training = commands.add_parser("train", help="run a workflow without a server or a screen")
    training.add_argument("workflow", type=Path, help="file of a workflow, as saved or as exported for the API")
    training.add_argument("--set", action="append", default=[], metavar="node.input=value", help="change an input")
    words, rest = _split(sys.argv[1:])
    options, unknown = parser.parse_known_args(words)
    rest = [*unknown, *rest]
    if unknown and options.command != "test":
        parser.error(f"{options.command} has no option {' '.join(unknown)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped too
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        if options.command == "quickstart":
            return quickstart()
        if options.command == "train":
            return train(options.workflow, options.set, rest)
        return serve(options.port) if options.command == "serve" else test(rest)
    except StepError as failure:
        say(f"\nFailed: {failure.step}\n\n{failure.reason}\n\nWhat to do: {failure.hint}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130


def device(host: Host) -> list[str]:
    """Return ComfyUI's option for the device."""
    with Step("Looking for a GPU"):
        return [] if has_cuda(host.python) else ["--cpu"]


def own_folders() -> list[str]:
    """Return options that put images, previews, settings and the database into .runtime."""
    folders = {"output": OUTPUT, "temp": RUNTIME / "temp", "user": RUNTIME / "user"}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    options = ["--database-url", f"sqlite:///{(RUNTIME / 'user' / 'comfyui.db').as_posix()}"]
    for name, folder in folders.items():
        options += [f"--{name}-directory", str(folder)]
    return options


def quickstart() -> int:
    """Train a style on the images that come with the pack, draw before and after, and print where the files are."""
    if not PROMPT.is_file():
        raise StepError("Reading the workflow", f"{PROMPT} is missing.", "Get it back with: git checkout -- tests")
    host = prepare(CHECKOUT)
    options = [*device(host), *own_folders(), "--disable-api-nodes"]
    # Without other packs: one that is broken or slow must not spoil the first try.
    options += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", link_pack(host.folder / "custom_nodes")]
    log, result = LOGS / "quickstart-server.log", LOGS / "quickstart-result.json"
    server = Server(host.folder, host.python, options, log)
    began, wall = time.monotonic(), time.time()
    try:
        with Step("Starting ComfyUI" + (" on the CPU" if "--cpu" in options else "")):
            server.start()
        say(f"Running the quickstart at {server.address} (Ctrl-C stops it)")
        outputs = follow(host, server, result)
    finally:
        server.stop()
    say(f"\nDone in {clock(time.monotonic() - began)}.\n")
    report(outputs, new_adapters(host, wall))
    return 0


def follow(host: Host, server: Server, result: Path) -> dict:
    """Run the quickstart through the client, which shows the progress, and return the nodes' outputs."""
    result.unlink(missing_ok=True)
    client = ROOT / "launcher" / "client.py"
    command = [str(host.python), str(client), server.address, str(PROMPT), str(result)]
    code = subprocess.run(command, env={**os.environ, "PYTHONUTF8": "1"}).returncode
    if code == 130:
        raise KeyboardInterrupt
    answer = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    if code or "outputs" not in answer:
        error = answer.get("error", {"step": "the client that follows the workflow", "reason": f"exit code {code}"})
        raise StepError(
            f"Running the quickstart, in {error['step']}",
            error["reason"],
            f"The server's log tells more: {server.log}\n"
            "If files are missing from the checkout, get them back with: git checkout -- .\n"
            "Otherwise please report it, with that log.",
        )
    return answer["outputs"]


def new_adapters(host: Host, since: float) -> list[Path]:
    """Return the LoRA files that were written since a time, in seconds since the epoch."""
    folders = (host.folder / "models" / "loras", OUTPUT / "loras")
    files = (file for folder in folders if folder.is_dir() for file in folder.rglob("*.safetensors"))
    return sorted(file for file in files if file.stat().st_mtime >= since - 2)  # some file systems round to two seconds


def report(outputs: dict, adapters: list[Path]) -> None:
    """Print where the images and the adapter are."""
    images = [image for node in outputs.values() for image in node.get("images", ()) if image.get("type") == "output"]
    say("Images:")
    for image in images:
        say(f"  {OUTPUT / image.get('subfolder', '') / image['filename']}")
    say("Adapter:")
    for adapter in adapters:
        say(f"  {adapter}")
    if not adapters:
        say("  none was written to models/loras")
    say("\nTo change things yourself: python3 run.py serve, open the address, then Templates, and search for AC-LoRA.")


def serve(port: int) -> int:
    """Start ComfyUI with the pack in it and keep it running until Ctrl-C."""
    host = prepare(CHECKOUT)
    link_pack(host.folder / "custom_nodes")
    options = [*device(host), *(own_folders() if host.own else [])]  # an existing ComfyUI keeps its own folders
    with Server(host.folder, host.python, options, log=None, port=port) as server:
        say(f"\nComfyUI with AC-LoRA is ready: {server.address}\nCtrl-C stops it.\n")
        assert server.process is not None
        return server.process.wait()


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before and after --, behind which train takes options of ComfyUI."""
    if "--" not in words or words[0] != "train":
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def train(workflow: Path, settings: list[str], comfy_options: list[str]) -> int:
    """Run a workflow without a server: this program becomes ComfyUI's Python, with its executor in it."""
    if int(os.environ.get("RANK", "0")):  # torchrun has started several: one that prints is enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    host = prepare(CHECKOUT)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        link_pack(host.folder / "custom_nodes")
    options = [*device(host), *(own_folders() if host.own else []), "--disable-api-nodes", *comfy_options]
    command = [str(host.python), str(ROOT / "launcher" / "headless.py"), str(host.folder), str(workflow.absolute())]
    command += ["--messages", str(LOGS / "train.log")]
    command += [word for setting in settings for word in ("--set", setting)]
    return become([*command, "--", *options], {**os.environ, "PYTHONUTF8": "1"})


def become(command: list[str], env: dict[str, str]) -> int:
    """Replace this process by another, which then gets its signals. On Windows wait for it and return its exit code."""
    if os.name != "nt":
        os.execve(command[0], command, env)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other one gets Ctrl-C too, and decides
    return subprocess.run(command, env=env).returncode


def test(pytest_options: list[str]) -> int:
    """Run every check, also after one that failed, and print a summary. Return 0 if all passed."""
    host = prepare(CHECKOUT, tests=True)
    env = {**os.environ, "COMFYUI_PATH": str(host.folder), "PYTHONUTF8": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # each of some fifty starts of ComfyUI would compile its files anew
    if parallel := _in_parallel(pytest_options):  # each with one thread, which takes no core while it waits
        env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **env}
    checks = {
        "ruff (style)": ["-m", "ruff", "check", "."],
        "ruff format (layout of the code)": ["-m", "ruff", "format", "--check", "."],
        "mypy (types of aclora_core and nodes)": ["-m", "launcher.checks", "types"],
        "import-linter (rooms import downwards)": ["-m", "launcher.checks", "imports"],
        "pytest (tests; skipped ones are listed above)": ["-m", "pytest", *parallel, *pytest_options],
    }
    codes = {}
    for name, words in checks.items():
        say(f"\n== {name}")
        codes[name] = subprocess.run([str(host.python), *words], cwd=ROOT, env=env).returncode
    say("\n== Summary")
    for name, code in codes.items():
        say(f"  {'passed' if code == 0 else 'FAILED'}  {name}")
    return 1 if any(codes.values()) else 0


def _in_parallel(pytest_options: list[str]) -> list[str]:
    """Return the options that run a file of tests in each of two processes; none where they share a GPU.

    A process with its servers takes some 5 GB of memory, so there are no more.
    """
    if (os.cpu_count() or 1) < 2 or any(option.startswith(("--gpu", "-n", "-s", "--pdb")) for option in pytest_options):
        return []
    return ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


if __name__ == "__main__":
    sys.exit(main())
