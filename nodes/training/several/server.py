"""A training in processes beside ComfyUI's server: what it shows, how it is cancelled, and how it ends."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import folder_paths
from PIL import Image

from ....aclora_core.config import CheckpointConfig
from ....aclora_core.training import RequestKind, Requests, Result, last_checkpoint
from ... import host
from ..requests import answering
from ..status import CANCELLED
from ..training import Training
from .count import sharing_text
from .graph import Prompt, links_of, nodes_for
from .group import LOG, Group, Message
from .task import Ended, Task, read_result, write_task

FOLDER = "aclora_workers"  # in ComfyUI's temp folder, which is emptied at its start

_LOOK = 0.2  # seconds between two looks for a cancel
_START_PATIENCE = 600.0  # seconds until all processes have started ComfyUI and found each other
_REASON_PATIENCE = 15.0  # seconds that one that lost another waits for that one's own reason
_OTHER = "OtherProcessError"  # the error of a process that has only lost another

log = logging.getLogger("aclora")


class WorkersError(RuntimeError):
    """A training in several processes has failed; the message says why."""


def train_on_several(
    training: Training,
    processes: int,
    prompt: Prompt,
    node_id: str | None,
    say: Callable[[str], None],
    candidates: Path,
) -> tuple[Ended, bool]:
    """Train in several processes, and return the end of the training and whether the user has cancelled it.

    A first cancel keeps what was learned; a second one ends the processes at once, and the prompt.

    Args:
        training: that is wanted.
        processes: that train together.
        prompt: in which the training node is.
        node_id: of that node.
        say: shows a text on the node.
        candidates: folder of all trainings' candidates.

    Raises:
        ValueError: the training cannot be done by several processes.
        WorkersError: a process has failed.
    """
    chosen = training.chosen
    links = links_of(prompt, node_id, chosen)
    nodes = nodes_for(prompt, links)
    packs = host.packs_of([*(node["class_type"] for node in nodes.values()), prompt[node_id or ""]["class_type"]])
    task = Task(
        nodes,
        links,
        training.latents,
        training.conditioning,
        training.config,
        chosen,
        training.step,
        candidates,
        host.model_identity(training.model),
        training.display.dark,
    )
    job = Path(folder_paths.get_temp_directory(), FOLDER, uuid.uuid4().hex)
    job.mkdir(parents=True)
    try:
        (job / "arguments").write_bytes(host.arguments_with(packs))
        write_task(task, job)
        shared = sharing_text(processes, training.config)
        say(f"Starting the processes …\n{shared}")
        host.free_gpu_memory()
        group = Group(processes, job)
        following = _Following(group, training, node_id, say, shared)
        try:
            following.run()
        finally:
            group.end()
        ended = read_result(job)
    except BaseException:
        for path in job.iterdir():  # the log stays, for whoever looks for the cause
            if path.name != LOG:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        raise
    shutil.rmtree(job, ignore_errors=True)
    return ended, following.cancelled


class _SentRequests(Requests):
    """Requests to a training in other processes.

    Args:
        send: takes them there.
    """

    def __init__(self, send: Callable[[RequestKind], None]) -> None:
        super().__init__(_nothing_to_save)
        self._send = send

    def ask(self, kind: RequestKind) -> Future[str]:
        """As in Requests."""
        is_new = not self.is_open(kind)
        future = super().ask(kind)
        if is_new and not future.done():
            self._send(kind)
        return future


def _nothing_to_save(now: Result) -> str:
    raise NotImplementedError("the process that trains saves")


class _Following:
    """The server's part while other processes train: shows what they tell, and tells them of a cancel."""

    def __init__(
        self, group: Group, training: Training, node_id: str | None, say: Callable[[str], None], shared: str
    ) -> None:
        self.group, self.training, self.node_id, self.shared = group, training, node_id, shared
        self.say = lambda text: say(f"{text}\n{shared}")
        self.requests = _SentRequests(lambda kind: group.tell("ask", kind))
        self.cancelled = self.done = False
        self.start_times: dict[str, float] = {}  # seconds until all that a first step needs was there
        self.reasons: dict[int, str] = {}  # of processes that have lost another, by rank
        self.joined: set[int] = set()
        self.finished: set[int] = set()  # which may end before the first one has its result
        self.lost_at: float | None = None  # when a process was seen to be lost whose reason is not known yet

    def run(self) -> None:
        """Follow the training to its end.

        Raises:
            WorkersError: it has failed.
        """
        self.started = time.monotonic()
        with ExitStack() as stack:
            self._stack = stack
            while not self.done:
                self._look_for_cancel()
                for rank, message in self.group.messages(_LOOK):
                    self._handle(rank, message)
                if not self.done:
                    self._check()

    def _look_for_cancel(self) -> None:
        if not host.cancelled():
            return
        if self.cancelled:
            host.raise_if_cancelled()
        host.clear_interrupt()  # so that a second one is seen
        self.cancelled = True
        self.say(CANCELLED)
        self.group.tell("cancel")

    def _handle(self, rank: int, message: Message) -> None:
        kind, *values = message
        if kind == "here" and self.cancelled:  # it has missed the cancel
            self.group.tell("cancel")
        elif kind == "joined":
            self.joined.add(rank)
            self._note_time("ComfyUI started")
        elif kind == "say":
            self.say(values[0])
        elif kind == "show":
            self._show(*values)
        elif kind == "began":
            self._note_time("the model loaded")
            self._stack.enter_context(answering(self.node_id, self.requests, draws=values[0]))
        elif kind == "answer":
            self.requests.answer(*values)
        elif kind == "result":
            self.done = True
        elif kind == "failed" and values[1] == _OTHER:
            self.reasons[rank] = values[0]
            self._lost()
        elif kind == "failed":
            raise WorkersError(values[0])
        elif kind == "finished":
            self.finished.add(rank)
        elif kind == "gone" and rank not in self.finished:
            self._lost()

    def _show(self, done: int, total: int, text: str, image: tuple[tuple[int, int], bytes] | None) -> None:
        if done and "the first step" not in self.start_times:
            self._note_time("the first step")
            parts = ", ".join(f"{what} after {seconds:.1f} s" for what, seconds in self.start_times.items())
            log.info("AC-LoRA: start of %d processes: %s.", self.group.size, parts)
        bar = self.training.display.bar
        bar.total = total
        bar.show(done, text and f"{text}\n{self.shared}", image and Image.frombytes("RGB", *image))

    def _note_time(self, what: str) -> None:
        self.start_times[what] = time.monotonic() - self.started

    def _lost(self) -> None:
        if self.lost_at is None:
            self.lost_at = time.monotonic()

    def _check(self) -> None:
        """Raise WorkersError where the processes have ended without a result, or do not come to one."""
        now = time.monotonic()
        if self.group.ended or (self.lost_at is not None and now - self.lost_at > _REASON_PATIENCE):
            for rank, message in self.group.messages(0):  # what was said last
                self._handle(rank, message)
            if not self.done:
                raise WorkersError(self._reason())
        elif len(self.joined) < self.group.size and now - self.started > _START_PATIENCE:
            raise WorkersError(
                f"The {self.group.size} processes did not find each other within {_START_PATIENCE / 60:.0f} minutes. "
                f"What they printed is in {self._log}."
            )

    @property
    def _log(self) -> str:
        return f"{FOLDER} of ComfyUI's temp folder"

    def _reason(self) -> str:
        """Return the sentences about processes that have ended without one of their own."""
        failures = self.group.failures()
        if failures:
            rank, code = failures[0]
            reason = f"Process {rank + 1} of {self.group.size} {_how_ended(code)}, so the training has ended."
        elif self.reasons:
            reason = next(iter(self.reasons.values()))
        else:
            reason = "The processes of this training have ended without a reason."
        return f"{reason} {_what_is_left(self.training.chosen.checkpoints)} What they printed is in {self._log}."


def _how_ended(code: int) -> str:
    """Say how a process has ended, by its exit code; a negative one is the number of a signal."""
    if code == -9:
        return "was killed (SIGKILL), as the system does where main memory is short"
    return f"was ended by signal {-code}" if code < 0 else f"has ended with exit code {code}"


def _what_is_left(checkpoints: CheckpointConfig | None) -> str:
    """Say from which checkpoint the training can be resumed."""
    if checkpoints is None:
        return "Nothing of it is kept, as AC-LoRA Checkpoint Options was not connected."
    step = last_checkpoint(checkpoints.folder)
    if step is None:
        return "It had no checkpoint yet."
    return f"Its last checkpoint is of step {step}; run again to resume from it."
