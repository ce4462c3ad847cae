"""Half-written files of dead processes are cleared, those of living ones left; a folder belongs to one process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aclora_core.storage import clear_partial_files, reserved, write_advice, write_atomically, write_safetensors
from aclora_core.storage.partial_files import lock, partial_path

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="on Windows an open file cannot be deleted anyway")


def half(folder: Path, name: str, age: float = 60) -> Path:
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def test_no_two_writers_use_one_partial_file(tmp_path: Path) -> None:
    assert partial_path(tmp_path / "a.safetensors") != partial_path(tmp_path / "a.safetensors")


def test_what_died_is_cleared_and_what_lives_is_left(tmp_path: Path) -> None:
    dead = half(tmp_path, ".ink_00001.safetensors.99.partial")
    living, fresh = half(tmp_path, ".ink_00002.safetensors.99.partial"), half(tmp_path, ".a.safetensors.9.partial", 0)
    foreign = half(tmp_path, ".notes.partial"), half(tmp_path, "whole.safetensors")
    with open(living, "rb+") as file:
        assert lock(file)
        clear_partial_files(tmp_path)
        assert not dead.exists() and living.exists() and fresh.exists() and all(path.exists() for path in foreign)
    clear_partial_files(tmp_path, "a")
    assert living.exists()
    clear_partial_files(tmp_path)
    assert not living.exists()
    clear_partial_files(tmp_path / "missing")


def test_a_drive_without_locks_waits_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("aclora_core.storage.partial_files.fcntl.flock", none)
    old, young = half(tmp_path, ".a.safetensors.1.partial", 7200), half(tmp_path, ".b.safetensors.1.partial", 600)
    clear_partial_files(tmp_path)
    assert not old.exists() and young.exists()
    with reserved(tmp_path) as ours:
        assert ours
    write_atomically(tmp_path / "c.safetensors", [b"whole"])
    assert (tmp_path / "c.safetensors").read_bytes() == b"whole"


def test_saving_clears_what_a_killed_save_has_left(tmp_path: Path) -> None:
    half(tmp_path, ".ink_00001.safetensors.99.partial")
    write_safetensors(tmp_path / "ink_00001.safetensors", {"a": torch.zeros(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["ink_00001.safetensors"]


def test_a_file_that_is_being_written_is_not_taken_for_a_dead_one(tmp_path: Path, monkeypatch) -> None:
    real, seen = os.fsync, []

    def fsync(file: int) -> None:
        real(file)
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        clear_partial_files(tmp_path)  # as another server would
        seen.append(len(list(tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a.safetensors", [b"whole"])
    assert seen == [1] and (tmp_path / "a.safetensors").read_bytes() == b"whole"


def test_a_folder_is_reserved_for_one_process_until_it_ends(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from aclora_core.storage import reserved\n"
    script += "with reserved(Path(sys.argv[1])) as ours: print(ours)"

    def other() -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        said = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
        )
        return said.stdout.strip()

    with reserved(tmp_path) as ours:
        assert ours and other() == "False"
    assert other() == "True" and not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="stop"), reserved(tmp_path):
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_counts_as_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with reserved(tmp_path / "file" / "folder") as ours:
        assert ours


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Free some space"), (errno.ENAMETOOLONG, "shorter name"), (errno.EROFS, "may be written to")],
)
def test_the_advice_fits_the_reason(number: int, advice: str) -> None:
    assert advice in write_advice(OSError(number, os.strerror(number)))
    assert "space" not in write_advice(OSError(errno.EACCES, "")) and write_advice(OSError("no number"))
