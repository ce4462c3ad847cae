"""Helpers for the tests of failures: small prompts, a browser's connection, waiting, and a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from launcher.client import read_text_event
from tests.support.host_server import HostServer

EXAMPLE = "example: fluent-emoji-high-contrast"
TRAIN, SAVE, DATASET = "train", "save", "dataset"
IMAGE_EVENT = 1  # ComfyUI's event number of an image; four bytes of its format come before the image
KNOWN = {"unload_models": True, "free_memory": True}


def prompt(server: HostServer, file: str, folder: str = EXAMPLE, size: int = 128, **settings: Any) -> dict[str, Any]:
    """Return the prompt of a short training on the tiny base, saved into a file of this name."""
    short = {"steps": 8, "batch_size": 2, "max_rank": 4, "layers": "attention"}
    dataset = {"folder": folder, "resolution": size, "vae": ["base", 2], "clip": ["base", 1]}
    links = {"model": ["base", 0], "latents": [DATASET, 0], "conditioning": [DATASET, 1], "options": ["plain", 0]}
    return {
        "base": server.node("ACLoRATinyBase"),
        DATASET: server.node("ACLoRADataset", **dataset),
        "plain": server.node("ACLoRAValidationOptions", held_out=0.0),
        TRAIN: server.node("ACLoRATrain", **short | settings | links),
        SAVE: server.node(
            "ACLoRASave",
            lora_model=[TRAIN, 1],
            filename=file,
            precision="fp32",
            overwrite=True,
            format="ComfyUI",
        ),
    }


def with_checkpoints(server: HostServer, base: dict[str, Any], name: str, every: int = 2) -> dict[str, Any]:
    """Return the prompt with checkpoints."""
    wished = {"checkpoint_every": every, "checkpoint_name": name, "options": ["plain", 0]}
    train = {**base[TRAIN], "inputs": {**base[TRAIN]["inputs"], "options": ["kept", 0]}}
    return {**base, "kept": server.node("ACLoRACheckpointOptions", **wished), TRAIN: train}


def drawing(server: HostServer, prefix: str, steps: int = 4) -> dict[str, Any]:
    """Return the prompt of an image by the untrained tiny base."""
    text = {"clip": ["base", 1], "text": "a rocket"}
    sampling = {"steps": steps, "cfg": 1.0, "seed": 5, "denoise": 1.0, "sampler_name": "euler", "scheduler": "normal"}
    links = {"model": ["base", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return {
        "base": server.node("ACLoRATinyBase"),
        "text": server.node("CLIPTextEncode", **text),
        "empty": server.node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "draw": server.node("KSampler", **sampling | links),
        "see": server.node("VAEDecode", samples=["draw", 0], vae=["base", 2]),
        "keep": server.node("SaveImage", images=["see", 0], filename_prefix=prefix),
    }


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def says(history: dict[str, Any], node: str = TRAIN) -> str:
    return str(history["outputs"][node]["text"][0])


def failure(history: dict[str, Any]) -> dict[str, Any]:
    """Return the server's message about the failed node."""
    assert history["status"]["status_str"] == "error"
    return next(facts for kind, facts in history["status"]["messages"] if kind == "execution_error")


def noise_images(folder: Path, count: int, size: tuple[int, int] = (64, 64)) -> Path:
    """Make a folder of different images, each with a caption."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(folder.name))
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.NEAREST).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"pattern {number % 7}", encoding="utf-8")
    return folder


def held(server: HostServer) -> dict[str, Any]:
    """Return what the server holds in memory."""
    return dict(server.get_json("/held"))


def let_go(server: HostServer) -> dict[str, Any]:
    """Return what the server holds after it was asked to free models and results, which it does when idle.

    The request is repeated: sent just after a prompt, between the server's check for requests and its wait for the
    next prompt, it would stay unnoticed until one comes.
    """
    for _ in range(100):
        server.post_json("/free", KNOWN)
        time.sleep(0.3)
        found = held(server)
        if not found["networks"]:
            return found
    raise AssertionError("models stay in memory")


class Browser:
    """A connection like a browser's, which records the messages in order, by node name."""

    def __init__(self, server: HostServer, client: str) -> None:
        self.url = f"{server.server.address}/ws?clientId={client}"
        self.kinds: list[str] = []
        self.progress: list[tuple[str, float]] = []
        self.texts: list[tuple[str, str]] = []
        self.images: list[Image.Image] = []  # shown on a running node
        self._open, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()))

    def __enter__(self) -> Browser:
        self._thread.start()
        assert self._open.wait(20), "the server took no connection"
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(20)

    async def _listen(self) -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(self.url, max_msg_size=0) as socket:
            self._open.set()
            while not self._end.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    self._note(await socket.receive(timeout=0.1))

    def _note(self, message: aiohttp.WSMessage) -> None:
        if message.type == aiohttp.WSMsgType.BINARY:
            self.texts += filter(None, [read_text_event(message.data)])
            if int.from_bytes(message.data[:4], "big") == IMAGE_EVENT:
                self.images.append(Image.open(io.BytesIO(message.data[8:])))
        elif message.type == aiohttp.WSMsgType.TEXT:
            event = json.loads(message.data)
            self.kinds.append(event["type"])
            if event["type"] == "progress_state":
                self.progress += [(name, node["value"]) for name, node in event["data"]["nodes"].items()]


@contextlib.contextmanager
def no_file_longer_than(server: HostServer, size: int) -> Iterator[None]:
    """Limit the size of files that the server can write: beyond it a write fails as on a full disk."""
    if sys.platform != "linux":
        pytest.skip("only Linux limits the files of a program that is running")
    assert server.server.process is not None
    process = psutil.Process(server.server.process.pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)
