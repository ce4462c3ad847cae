"""Processes that share the GPU: each takes the next job when it is done with one, and none waits for the others."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from bench.no_search.jobs import Job, Row
from bench.no_search.worker import Place, serve


def run_all(
    jobs: Sequence[Job],
    places: Sequence[Place],
    on_start: Callable[[dict[str, Any]], None],
    on_row: Callable[[Row], None],
    deadline: float,
) -> int:
    """Runs the jobs in their order, one process for each place; returns how many were left over.

    on_start gets what a process says of itself when it is ready, on_row each row as it comes. After the deadline
    (of time.monotonic) no job is begun. Should a process die, its job's row says so and the others go on.
    """
    waiting = deque(jobs)
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    running: dict[Connection, Job | None] = {}
    processes = []
    for place in places[: len(jobs)]:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, place), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the process does
        processes.append(process)
        running[ours] = None
    try:
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                _answer(connection, running, waiting, on_start, on_row, deadline)
    finally:
        for connection in running:  # after an error here; what waits for a job ends then
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
    """Takes what a process has to say and gives it its next job, if there is one."""
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
