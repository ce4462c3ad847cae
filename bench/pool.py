"""A pool of processes that share the GPU; each takes the next job as soon as it has finished one."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]  # the result of a job, as it is written into a JSON file


class Job(Protocol):
    """One measurement of a benchmark."""

    def row(self) -> Row:
        """Return the part of the job's row that is known before it runs."""


@dataclass(frozen=True)
class Place:
    """The folder, data and device of a worker process."""

    host: Path
    data: Path
    gpu: str | None  # for CUDA_VISIBLE_DEVICES; None to leave it unset
    threads: int


def run_all(
    jobs: Sequence[Job],
    places: Sequence[Place],
    serve: Callable[[Connection, Place], None],
    on_start: Callable[[dict[str, Any]], None],
    on_row: Callable[[Row], None],
    deadline: float,
) -> int:
    """Run the jobs in order, one process for each place; return how many were not started.

    If a process dies, the row of its job says so and the others continue.

    Args:
        jobs: what to do.
        places: one for each process.
        serve: run in each process: sends a description, then answers each job with its row until None is received.
        on_start: called with a process's description when it is ready.
        on_row: called with each row.
        deadline: time (of time.monotonic) after which no job starts.
    """
    waiting = deque(jobs)
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    running: dict[Connection, Job | None] = {}
    processes = []
    for place in places[: len(jobs)]:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, place), daemon=True)
        process.start()
        theirs.close()  # so that the pipe is closed when the process ends
        processes.append(process)
        running[ours] = None
    try:
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                _answer(connection, running, waiting, on_start, on_row, deadline)
    finally:
        for connection in running:  # after an error here: a process that waits for a job then ends
            connection.close()
        for process in processes:
            process.join(timeout=10)
            process.terminate()
    return len(waiting)


def _answer(
    connection: Connection,
    running: dict[Connection, Job | None],
    waiting: deque[Job],
    on_start: Callable[[dict[str, Any]], None],
    on_row: Callable[[Row], None],
    deadline: float,
) -> None:
    """Receive a process's message and send it its next job, if there is one."""
    job = running.pop(connection)
    try:
        said = connection.recv()
    except EOFError:
        if job is not None:
            on_row({**job.row(), "error": "the process ended before the job did"})
        return
    (on_row if job is not None else on_start)(said)
    if waiting and time.monotonic() < deadline:
        running[connection] = waiting.popleft()
        connection.send(running[connection])
    else:
        connection.send(None)
        connection.close()


def gpus(processes: int, count: int) -> list[str | None]:
    """Return the GPU that each process uses, evenly distributed; None for the default device."""
    if count < 2:
        return [None] * processes
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [names[number % count] for number in range(processes)]
