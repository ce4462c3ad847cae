"""Run the fuzz tests again and again, each time with other random numbers, until the time is over.

    python -m bench.fuzz --minutes 30
    ACLORA_FUZZ_SEED=17 python -m pytest tests/core/adapter/test_fuzz_lora_files.py     # what failed with seed 17

Images, captions, LoRA files, checkpoints, cached encodings and names, damaged or made up: each is read with a true
remark, or refused by a sentence of ours. `run.py test` does the same once, always with the same numbers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from launcher.environment import ROOT


def failures(seed: int) -> list[str]:
    """Return pytest's lines about the tests that fail with a seed."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_fuzz_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *files]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "ACLORA_FUZZ_SEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return found or ([f"pytest ended with {run.returncode}: {run.stdout[-300:]}"] if run.returncode else [])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    args = parser.parse_args()
    end, seed, failed = time.monotonic() + 60 * args.minutes, args.first, 0
    while time.monotonic() < end:
        lines = failures(seed)
        failed += bool(lines)
        print(f"seed {seed}: {'passed' if not lines else ''}", *lines, sep="\n  " if lines else "", flush=True)
        seed += 1
    print(f"{seed - args.first} seeds, {failed} with failures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
