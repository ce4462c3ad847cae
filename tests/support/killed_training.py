"""Train the toy in child processes and kill them; test_checkpoint.py runs this as a script.

    python killed_training.py FOLDER

Importing torch takes longer than training the toy, so one process imports it and forks the processes to kill.
Prints JSON: digests of the adapter of an uninterrupted training, and of one killed and resumed at each kill point.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # otherwise every process would import it with its first optimizer

from aclora_core.config.checkpoints import CheckpointConfig
from aclora_core.config.train_config import TrainConfig
from aclora_core.training.progress import Result
from tests.support.toy import toy, train

CONFIG = TrainConfig(
    steps=34,
    learning_rate=0.1,
    batch_size=8,
    max_rank=6,
    mode="product",
    restart_every=2,
    held_out=0.2,
    stop_early=False,
    refit=True,
    smallest=True,
)
POINTS = 17  # kill points in the model's calls: steps, validation, truncation
WRITES = (1, 4, 8)  # and while the first, fourth and eighth checkpoint is written


def run(folder: Path | None, at_call: Callable[[int], bool] = lambda call: False) -> tuple[Result, int]:
    """Return the training's result and the number of model calls. at_call: called before each."""
    model = toy(16, spoil=at_call)
    checkpoints = CheckpointConfig(folder, every=5) if folder else None
    return train(model, CONFIG, checkpoints=checkpoints), len(model.calls)


def digest(result: Result) -> str:
    """Hash the adapter bit by bit, and the report without times."""
    found = hashlib.sha256()
    for name, layer in result.adapter.layers.items():
        found.update(f"{name} {layer.alpha}".encode())
        for factor in (layer.lora_down, layer.lora_up):
            found.update(factor.contiguous().numpy().tobytes())
    report = json.loads(result.report.to_json())
    for name in ("started_at", "finished_at", "validation_seconds", "checkpoint_seconds", "seconds_run"):
        report["settings"].pop(name, None)
    found.update(json.dumps(report, sort_keys=True).encode())
    return found.hexdigest()


def killed(work: Callable[[], object]) -> bool:
    """Run the work in a child process; return whether SIGKILL ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def die() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def die_while_writing(folder: Path, number: int) -> None:
    """Die when the checkpoint of this number is written completely but not yet renamed."""
    done, real = [], os.fsync

    def fsync(file: int) -> None:
        real(file)
        done.append(file)
        if len(done) == number:
            die()

    os.fsync = fsync
    run(folder)


def in_child(path: Path, work: Callable[[], str]) -> str:
    """Run the work in a child process and return its text; after a backward pass no fork is possible."""
    pid = os.fork()
    if pid == 0:
        path.write_text(work())
        os._exit(0)
    os.waitpid(pid, 0)
    return path.read_text()


def main(folder: Path) -> None:
    torch.set_num_threads(1)

    def undisturbed() -> str:
        result, calls = run(None)
        rank = result.adapter.layers["toy.attn"].rank
        return json.dumps([digest(result), calls, rank, len(result.report.restarts)])

    def resumed(place: Path) -> Callable[[], str]:
        return lambda: digest(run(place)[0])

    whole, calls, rank, restarts = json.loads(in_child(folder / "whole", undisturbed))
    ends = []
    for point in range(POINTS):
        place, call = folder / f"call{point}", 1 + point * (calls - 2) // (POINTS - 1)
        was_killed = killed(lambda place=place, call=call: run(place, lambda now: now == call and die()))  # type: ignore
        ends.append([f"call {call} of {calls}", was_killed, in_child(folder / "end", resumed(place))])
    for number in WRITES:
        place = folder / f"write{number}"
        was_killed = killed(lambda place=place, number=number: die_while_writing(place, number))  # type: ignore
        for half in place.glob("*.partial"):
            os.utime(half, (0, 0))  # as if the training went on later
        ends.append([f"write {number}", was_killed, in_child(folder / "end", resumed(place))])
    left = sorted(path.name for path in (folder / "write4").iterdir())
    sys.stdout.write(json.dumps({"whole": whole, "rank": rank, "restarts": restarts, "ends": ends, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
