"""The part of one process in a training on several GPUs. workers/worker.py calls it, once ComfyUI is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ....aclora_core.training import RequestKind, Requests, Result
from ... import host
from ..requests import ENDED
from ..status import activity_text
from ..training import Training
from .task import Ended, Task, read_task, write_result

_LAST = "AC-LoRA worker"  # the class of the node that trains in place of Train AC-LoRA


class _SentBar(host.ProgressBar):
    """A progress bar that the server shows.

    Args:
        total: steps until the bar is full.
        send: takes messages to the server.
    """

    def __init__(self, total: int, send: Callable[..., None]) -> None:
        super().__init__(total)
        self._send = send

    def show(self, done: int, text: str = "", image: Image.Image | None = None) -> None:
        """As in ProgressBar."""
        self.done = done
        pixels = image and image.convert("RGB")
        self._send("show", done, self.total, text, pixels and (pixels.size, pixels.tobytes()))


def take_part(comfy: Any, job: Path, line: Any) -> None:
    """Load the model and train it together with the other processes. The first one tells the server.

    Args:
        comfy: ComfyUI in this process, as workers/headless.py has it.
        job: folder with the task; gets the result.
        line: to the server, as workers/line.py has it.

    Raises:
        RuntimeError: a node before the training has failed; the message is that of the node.
        Exception: whatever the training raises.
    """
    task = read_task(job)
    processes = host.processes()
    line.send("joined")
    send = line.send if processes.is_first else _nothing
    send("say", activity_text("loading"))
    failures: list[Exception] = []

    def work(model: Any = None, clip: Any = None, vae: Any = None) -> None:
        try:
            _train(task, model, clip, vae, job, line, send)
        except Exception as error:  # raised again below, where no node stands around it
            failures.append(error)

    host.add_last_node(_LAST, {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}, work)
    last = {"class_type": _LAST, "inputs": dict(task.links)}
    comfy.run({**task.nodes, _LAST: last}, [_LAST], _raise_failure)
    if failures:
        raise failures[0]


def _raise_failure(event: Any, data: Any, run: str) -> None:
    """Raise what a node before the training has raised, by ComfyUI's message of it."""
    if event == "execution_error":
        raise RuntimeError(f"{data['node_type']}: {str(data['exception_message']).strip()}")
    if event == "execution_interrupted":
        raise RuntimeError("The loading of the model was interrupted.")


def _train(task: Task, model: Any, clip: Any, vae: Any, job: Path, line: Any, send: Callable[..., None]) -> None:
    processes = host.processes()
    previews = task.chosen.previews
    chosen = replace(task.chosen, clip=clip, previews=previews and replace(previews, vae=vae))
    training = Training(
        model,
        task.latents,
        task.conditioning,
        chosen,
        task.config,
        task.step,
        _SentBar(task.config.steps, send),
        lambda text: send("say", text),
        task.dark,
    )

    def learn(network: host.HostModel, images: host.HostTrainingSet) -> None:
        with processes.failing_together():
            choice = training.choice(network, images, processes.size, folder=task.candidates, identity=task.identity)
            key = choice.store.folder.name
            if len(set(processes.gather(key))) > 1:
                raise ValueError(
                    "The processes of this training have loaded different models: a node before the training gives "
                    "each of them another one. Set gpus on AC-LoRA Speed Options to 1."
                )
        requests = training.requests(network, images)
        send("began", bool(training.previews.prompts))
        line.attach(lambda message: _handle(message, requests, send))
        result = training.train(network, images, choice, requests)
        requests.end(ENDED)
        if processes.is_first:
            drawn = [image.cpu() for image in training.previews.images]
            at = training.previews.drawn_at
            try:
                write_result(Ended(result, key, network.base_name, images.resolution, drawn, at), job)
            except OSError as error:
                kept = _saved_instead(training, result, network, images)
                raise OSError(
                    f"The training has ended, and its result cannot be handed over: {error}. {kept}"
                ) from error

    training.opened(learn)
    send("result")
    line.send("finished")


def _saved_instead(training: Training, result: Result, network: host.HostModel, images: host.HostTrainingSet) -> str:
    """Save the LoRA where it is not lost, and return a sentence on it; another full disk has a sentence too."""
    try:
        return training.saved(result, network, images)
    except (ValueError, OSError) as error:
        return f"It cannot be saved in models/loras either ({error}). Free some space and run again."


def _handle(message: tuple[Any, ...], requests: Requests, send: Callable[..., None]) -> None:
    """Do what the server asks for, in another thread than that of the training."""
    kind, *values = message
    if kind == "cancel":
        host.interrupt()
    elif kind == "ask" and host.processes().is_first:
        asked: RequestKind = values[0]
        requests.ask(asked).add_done_callback(lambda future: send("answer", asked, future.result()))


def _nothing(*message: Any) -> None:
    """Send nothing, as the first process tells the server."""
