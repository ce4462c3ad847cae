"""Start the workers of a training by torchrun's Python interface, and end them with whoever has started this program.

    python supervisor.py SIZE JOB

Its standard input is a pipe that nobody writes to: once that closes, as when ComfyUI's server is killed, all end. What
became of workers that failed is written to JOB/failures.json, as [[rank, exit code], …].
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

WORKER = Path(__file__).resolve().with_name("worker.py")
PATIENCE = 60.0  # seconds that torchrun has for ending its workers; it kills them after 30


def end_with_parent() -> None:
    """Wait for the pipe to close, and end."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun ends its workers then
    time.sleep(PATIENCE)
    os._exit(1)  # workers end by themselves too, as they lose the server


def main(size: int, job: Path) -> int:
    """Run the workers to their end. Return 0 if none of them failed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # the name of a machine does not always lead to it
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-u", str(WORKER))
    except ChildFailedError as error:
        failures = [[rank, failure.exitcode] for rank, failure in sorted(error.failures.items())]
        (job / "failures.json").write_text(json.dumps(failures), encoding="utf-8")
        return 1
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
