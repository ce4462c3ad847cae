"""Output for people: one line per step, the time it takes, and what to do when it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HEARTBEAT = 20.0  # seconds between lines where the output is no terminal


class StepError(Exception):
    """A step that failed. `hint` says what the user can do about it."""

    def __init__(self, step: str, reason: str, hint: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step, self.reason, self.hint = step, reason, hint


def say(text: str = "") -> None:
    """Print a line and flush it, also when the output goes into a file."""
    print(text, flush=True)


def clock(seconds: float) -> str:
    """Format seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class LiveLine:
    """A line that is rewritten in a terminal; elsewhere only `keep` prints."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.shown = 0

    def show(self, text: str) -> None:
        """Replace the line; do nothing where lines cannot be replaced."""
        if not self.live:
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        sys.stdout.write("\r" + text + " " * max(0, self.shown - len(text)))
        sys.stdout.flush()
        self.shown = len(text)

    def keep(self, text: str) -> None:
        """Print a line that stays, and begin a new one."""
        if self.live:
            self.show(text)
            say()
            self.shown = 0
        else:
            say(text)


class Step:
    """A context manager that shows a step, the time since it began and its latest message."""

    def __init__(self, name: str) -> None:
        self.name, self.message = name, ""
        self.line, self.ended = LiveLine(), threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Step:
        self.began = time.monotonic()
        if not self.line.live:
            say(f"{self.name} ...")
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        outcome = "failed" if kind else "done"
        self.line.keep(f"{self.name} ... {outcome} ({clock(time.monotonic() - self.began)})")

    def _tick(self) -> None:
        while not self.ended.wait(0.5 if self.line.live else HEARTBEAT):
            text = f"{self.name} ... {clock(time.monotonic() - self.began)}  {self.message}"
            if self.line.live:
                self.line.show(text)
            else:
                say(text)


def run_step(
    name: str, command: Sequence[str | Path], log: Path, hint: str, env: Mapping[str, str] | None = None
) -> None:
    """Run a command as one step, with its output in `log`.

    Raises:
        StepError: the command failed; the reason is its last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=12)
    with Step(name) as step, log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {name}: {' '.join(map(str, command))}\n")
        try:
            for line in output_of(command, env):
                file.write(line)
                file.flush()
                tail.append(line.rstrip())
                step.message = line.strip()[:70]
        except OSError as error:
            raise StepError(name, str(error), hint) from error
        except subprocess.CalledProcessError as error:
            reason = "\n".join(tail) or f"exit code {error.returncode}"
            raise StepError(name, reason, f"{hint}\nThe whole log: {log}") from error


def output_of(command: Sequence[str | Path], env: Mapping[str, str] | None) -> Iterator[str]:
    """Yield the lines of a command's output as they come.

    Raises:
        CalledProcessError: at the end, if the command failed.
    """
    words = [str(word) for word in command]
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=dict(env or os.environ),
    ) as process:
        try:
            yield from process.stdout or ()
        except BaseException:
            process.kill()  # Ctrl-C, or the caller stopped reading
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
