"""A pool of processes that share the GPU; each takes the next job as soon as it has finished one."""

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
    """Run the jobs in order, one process for each place; return how many were not started.

    If a process dies, the row of its job says so and the others continue.

    Args:
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
