"""Processes notice the end of another while their main threads are busy elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from launcher.environment import ROOT
from tests.support.server_runs import until

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

PROGRAM = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from aclora_core.distributed import Processes
from aclora_core.distributed.neighbour import watch_neighbour

folder, rank, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
processes = Processes(rank, 3, control=dist.group.WORLD)
watch_neighbour(processes, rank, 3, (folder / f"noticed by {rank}").touch)
processes.gather(None)
(folder / f"watching {rank}").touch()
time.sleep(seconds)
"""


@contextmanager
def three_processes(folder: Path, seconds: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three processes that watch each other and end after a time, all of which have begun."""
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    processes = [subprocess.Popen([*command, str(rank), str(seconds)], cwd=ROOT) for rank in range(3)]
    try:
        for rank in range(3):
            until((folder / f"watching {rank}").exists, f"process {rank}")
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_all_notice_a_killed_process(tmp_path: Path) -> None:
    with three_processes(tmp_path, seconds=60) as processes:
        assert not list(tmp_path.glob("noticed *"))
        processes[2].kill()
        for rank in (1, 0):
            until((tmp_path / f"noticed by {rank}").exists, f"a notice of process {rank}")


def test_processes_that_come_to_their_end_do_not_fail(tmp_path: Path) -> None:
    with three_processes(tmp_path, seconds=0.2) as processes:
        assert [process.wait(60) for process in processes] == [0, 0, 0]
