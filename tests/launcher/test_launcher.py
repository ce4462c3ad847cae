"""The parts of run.py that need no network: finding ComfyUI, linking the pack, stamps, checks and progress."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import checks, environment, host
from launcher.console import StepError, clock, run_step
from launcher.server import free_port

client = pytest.importorskip(
    "launcher.client", reason="aiohttp comes with ComfyUI: run `python3 run.py test`", exc_type=ImportError
)


def make_comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.30.0"\n', encoding="utf-8")
    return folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the checkout."""
    folder = tmp_path / "pack"
    folder.mkdir()
    monkeypatch.setattr(host, "ROOT", folder)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return folder


def test_named_comfyui_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, around = make_comfyui(tmp_path / "named"), make_comfyui(tmp_path / "around")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert host.given_folder(around / "custom_nodes" / "pack") == named


def test_comfyui_around_the_checkout_comes_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    around = make_comfyui(tmp_path / "around")
    assert host.given_folder(around / "custom_nodes" / "pack") == around
    assert host.given_folder(tmp_path / "custom_nodes" / "pack") is None


def test_wrong_comfyui_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(StepError, match=tmp_path.name):
        host.given_folder(tmp_path)


def test_version_is_read_from_the_tree(tmp_path: Path) -> None:
    assert host.own_version(make_comfyui(tmp_path / "comfyui")) == "0.30.0"
    assert host.own_version(tmp_path) == ""


def test_pack_is_linked_once(tmp_path: Path, checkout: Path) -> None:
    nodes = tmp_path / "custom_nodes"
    assert host.link_pack(nodes) == host.link_pack(nodes) == host.PACK_FOLDER
    assert [entry.resolve() for entry in nodes.iterdir()] == [checkout]


def test_link_to_a_checkout_that_moved_is_renewed(tmp_path: Path, checkout: Path) -> None:
    nodes = tmp_path / "custom_nodes"
    nodes.mkdir()
    (nodes / host.PACK_FOLDER).symlink_to(tmp_path / "gone")
    host.link_pack(nodes)
    assert (nodes / host.PACK_FOLDER).resolve() == checkout


def test_checkout_under_another_name_is_recognised(tmp_path: Path, checkout: Path) -> None:
    nodes = tmp_path / "custom_nodes"
    nodes.mkdir()
    (nodes / "my-copy").symlink_to(checkout)
    assert host.link_pack(nodes) == "my-copy"


def test_foreign_folder_is_left_alone(tmp_path: Path, checkout: Path) -> None:
    theirs = tmp_path / "custom_nodes" / host.PACK_FOLDER / "file"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    with pytest.raises(StepError, match="not this checkout"):
        host.link_pack(tmp_path / "custom_nodes")
    assert theirs.exists()


def test_copy_is_renewed_where_links_are_not_allowed(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("links need a privilege")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (checkout / "run.py").write_text("1", encoding="utf-8")
    (checkout / ".runtime").mkdir()
    host.link_pack(tmp_path / "custom_nodes")
    (checkout / "run.py").write_text("2", encoding="utf-8")
    copy = tmp_path / "custom_nodes" / host.link_pack(tmp_path / "custom_nodes")
    assert (copy / "run.py").read_text(encoding="utf-8") == "2"
    assert not (copy / ".runtime").exists()


def test_same_requirements_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(environment, "run_step", lambda name, command, *_: commands.append(command))
    requirements = tmp_path / "requirements.txt"
    for text in ("a", "a", "b"):
        requirements.write_text(text, encoding="utf-8")
        environment.install("things", Path(sys.executable), [], [requirements], tmp_path)
    assert len(commands) == 2


def test_failed_step_has_its_last_lines_and_the_hint(tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    with pytest.raises(StepError) as caught:
        run_step("Trying", [sys.executable, "-c", "print('out of paper'); raise SystemExit(3)"], log, "Buy paper.")
    assert "out of paper" in caught.value.reason
    assert caught.value.hint.startswith("Buy paper.") and str(log) in caught.value.hint
    assert "out of paper" in log.read_text(encoding="utf-8")


def test_port_in_use_is_not_taken() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert free_port(port) != port


def test_text_of_a_node_is_read_and_images_are_not() -> None:
    text = struct.pack(">II", 3, 2) + b"12" + "loss 0.1 →".encode()
    assert client.read_text_event(text) == ("12", "loss 0.1 →")
    assert client.read_text_event(struct.pack(">II", 1, 2) + b"\xff\xd8") is None
    assert client.read_text_event(b"") is None


def test_progress_shows_title_bar_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    progress = client.Progress({"7": {"class_type": "ACLoRATrain", "_meta": {"title": "Train AC-LoRA"}}})
    progress.set_text("7", "too early")
    progress.start("7")
    progress.set_text("7", "loss 0.25\nsecond line")
    progress.advance("7", 5, 10)
    progress.start(None)
    middle, end = capsys.readouterr().out.splitlines()
    assert "Train AC-LoRA" in middle and "5/10 loss 0.25 (" in middle
    assert "#" * client.BAR in end and "second line" not in end


def test_failing_node_is_named() -> None:
    progress = client.Progress({"7": {"class_type": "ACLoRATrain", "_meta": {"title": "Train AC-LoRA"}}})
    data = {"prompt_id": "p", "node_id": "7", "node_type": "ACLoRATrain", "exception_message": "rank is 99\n"}
    with pytest.raises(client.RunError, match="rank is 99") as caught:
        client.handle({"type": "execution_error", "data": data}, "p", progress)
    assert "Train AC-LoRA" in caught.value.step
    assert client.handle({"type": "execution_error", "data": {**data, "prompt_id": "other"}}, "p", progress) is False


def test_checks_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.main(["nonsense"]) == 2
    assert "launcher.checks types" in capsys.readouterr().out


def test_checks_run_mypy_and_import_linter_in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], Path]] = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        calls.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, returncode=len(calls))

    monkeypatch.setattr(checks.subprocess, "run", run)
    assert [checks.main(["types"]), checks.main(["imports"])] == [1, 2]
    (types, _), (imports, _) = calls
    assert types == ["-m", "mypy"] and "lint_imports_command" in imports[1]
    assert {cwd for _, cwd in calls} == {environment.ROOT}
    assert any(entry.resolve() == environment.ROOT for entry in (environment.RUNTIME / "types").iterdir())


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3600)] == ["0:00", "0:59", "1:01", "60:00"]


@pytest.mark.parametrize("words, message", [(["--help"], "quickstart"), (["serve", "--nonsense"], "--nonsense")])
def test_run_py_explains_itself(words: list[str], message: str) -> None:
    result = subprocess.run([sys.executable, "run.py", *words], cwd=environment.ROOT, capture_output=True, text=True)
    assert message in result.stdout + result.stderr
