"""Trains the toy in processes of their own and kills them; run as a script by test_checkpoint.py.

    python killed_training.py FOLDER

Importing torch takes longer than training the toy, so one process imports it and forks the ones that are killed.
Prints JSON: the adapter of an undisturbed training, and for each kill point that of one that was killed and resumed.
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
import torch._dynamo  # the first optimizer of a process imports it, which takes a second: once here for all

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
POINTS = 17  # by the model's calls: steps, measurements, cuts
WRITES = (1, 4, 8)  # and while a checkpoint is written, the first, fourth and eighth


def run(folder: Path | None, at_call: Callable[[int], bool] = lambda call: False) -> tuple[Result, int]:
    """The training's result, and how often the model was called. at_call: told of every call."""
    model = toy(16, spoil=at_call)
    checkpoints = CheckpointConfig(folder, every=5) if folder else None
    return train(model, CONFIG, checkpoints=checkpoints), len(model.calls)


def digest(result: Result) -> str:
    """Of every bit of the adapter, and of all that the report says except for times."""
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
    """Whether the work, done in another process, ended by SIGKILL."""
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
    """Ends when the checkpoint of this number lies complete beside its target, but has not its name yet."""
    done, real = [], os.fsync

    def fsync(file: int) -> None:
        real(file)
        done.append(file)
        if len(done) == number:
            die()

    os.fsync = fsync
    run(folder)


def in_child(path: Path, work: Callable[[], str]) -> str:
    """What the work says; done in another process, as a fork must not follow a backward pass."""
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
        ends.append([f"write {number}", was_killed, in_child(folder / "end", resumed(place))])
    left = sorted(path.name for path in (folder / "write4").iterdir())
    sys.stdout.write(json.dumps({"whole": whole, "rank": rank, "restarts": restarts, "ends": ends, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
