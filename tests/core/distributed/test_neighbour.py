"""A process notices the end of the next one while its main thread is busy elsewhere."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launcher.environment import ROOT

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

PROGRAM = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from aclora_core.distributed.neighbour import watch_neighbour

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
watch_neighbour(dist.new_group(backend="gloo", timeout=timedelta(days=1)), (folder / f"noticed by {rank}").touch)
dist.barrier()
(folder / f"watching {rank}").touch()
time.sleep(60)
"""


def until_exists(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)


def test_the_one_before_a_killed_process_notices(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(3)]
    try:
        for rank in range(3):
            until_exists(tmp_path / f"watching {rank}")
        assert not list(tmp_path.glob("noticed *"))
        processes[2].kill()
        until_exists(tmp_path / "noticed by 1")
        assert not (tmp_path / "noticed by 0").exists()
        processes[1].kill()
        until_exists(tmp_path / "noticed by 0")
    finally:
        for process in processes:
            process.kill()
            process.wait()
