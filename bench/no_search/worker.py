"""One process's side of the test: ComfyUI, the tiny base and the images are opened once, then job after job runs."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch

from bench.no_search import images
from bench.no_search.jobs import Job, Row
from bench.training_session import Session, make_config, training_session
from launcher.inprocess import load_pack, open_host

_SEED = 20_261  # of the verdict's noise; no training has it
_BATCH = 240  # images of the verdict at once


@dataclass(frozen=True)
class Place:
    """Where a process works and on what."""

    host: Path
    data: Path
    gpu: str | None  # the one it may see; None for whatever there is
    threads: int


def serve(connection: Connection, place: Place) -> None:
    """Opens everything, says so, and answers each job with its row, until there are no more."""
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # read when CUDA is first used
    torch.set_num_threads(place.threads)
    with opened(place.host, place.data) as bench:
        connection.send({"device": bench.device_name, "torch": torch.__version__, "layers": bench.layer_count})
        while (job := connection.recv()) is not None:
            connection.send(bench.run(job))


@contextmanager
def opened(host: Path, data: Path) -> Iterator[Bench]:
    """The bench with the images of a file; every style's are numbered as the file has them."""
    open_host(host)
    pack = load_pack()
    latents: list[dict[str, torch.Tensor]] = []
    conditioning: list[Any] = []
    numbers: dict[str, tuple[range, range]] = {}
    with torch.inference_mode():
        model, clip, vae = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        for name, style in images.read(data).items():
            parts = []
            for part in (style.training, style.verdict):
                parts.append(range(len(latents), len(latents) + len(part.captions)))
                samples = vae.encode(torch.from_numpy(part.images).float() / 255)
                latents += [{"samples": sample.clone()} for sample in samples.split(1)]
                conditioning += [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in part.captions]
            numbers[name] = (parts[0], parts[1])
        with training_session(pack, model, latents, conditioning) as session:
            yield Bench(pack, session, numbers)


class Bench:
    """The tiny base with the images of all styles. numbers: style -> (those to learn from, those of the verdict)."""

    def __init__(self, pack: ModuleType, session: Session, numbers: dict[str, tuple[range, range]]) -> None:
        self.pack, self.session, self.numbers = pack, session, numbers
        core = f"{pack.__name__}.aclora_core"
        names = ("adapter", "lora", "lora.targets", "training.validation")
        self.core: dict[str, Any] = {name: importlib.import_module(f"{core}.{name}") for name in names}
        network = session.network
        self.layers = self.core["lora.targets"].preset_layers(network.network, "all", network.prefix)
        self._verdicts: dict[str, Any] = {}

    @property
    def device_name(self) -> str:
        on_gpu = self.session.network.device.type == "cuda"
        return torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    def run(self, job: Job) -> Row:
        """What came of a job; where it failed, the error in place of the numbers."""
        began = time.monotonic()
        try:
            row = {"loss": self.verdict(job.style)} if job.kind == "base" else self._trained(job)
        except Exception as error:  # the other jobs are worth running all the same
            row = {"error": f"{type(error).__name__}: {error}"}
        return {**job.row(), **finite(row), "seconds": round(time.monotonic() - began, 2)}

    def verdict(self, style: str) -> float:
        """The denoising loss of the model as it is now on the style's verdict images."""
        if style not in self._verdicts:
            held_out = self.core["training.validation"].ValidationSet
            self._verdicts[style] = held_out(self.session.network, self.numbers[style][1], _SEED, _BATCH)
        return float(self._verdicts[style].losses().mean())

    def verdict_with(self, adapter: Any, style: str) -> float:
        """Return the verdict loss with an adapter on the model."""
        network = self.session.network
        weights = self.core["lora"].FlatParameters(adapter.layers, network.device, network.dtype)
        with self.core["lora"].injected(self.layers, weights.layers, network.is_unpatched):
            return self.verdict(style)

    def _trained(self, job: Job) -> Row:
        config = make_config(self.pack, **job.settings)
        watch = Watch(self, job)
        result = self.session.train(config, on_step=watch, pictures=self.numbers[job.style][0])
        ranks = [layer.rank for layer in result.adapter.layers.values()]
        report = result.report
        return {
            "loss": self.verdict_with(result.adapter, job.style),
            "losses": watch.losses,
            "whole": watch.whole,
            "steps_run": report.settings["steps_run"],
            "best_step": report.settings.get("best_step"),
            "mean_rank": sum(ranks) / len(ranks),
            "bytes": self._file_size(result.adapter),
            "restarts": len(report.restarts),
            "kept": [mean([rank.kept_delta for rank in restart.layers.values()]) for restart in report.restarts],
            "validation": [list(point) for point in report.validation],
            "cut": next((cut.name for cut in report.cuts if cut.chosen), "whole"),
            "cuts": [[cut.name, cut.mean_rank, cut.size, cut.loss, cut.error] for cut in report.cuts],
        }

    def _file_size(self, adapter: Any) -> int:
        """Bytes of the adapter's file at the precision that Save AC-LoRA writes by default, its report left out."""
        files = self.core["adapter"]
        return len(safetensors.torch.save(files.to_state_dict(files.with_dtype(adapter, torch.float16))))


@dataclass
class Watch:
    """Measures the verdict while a training goes on; the training itself learns nothing of it.

    losses: at the job's marks. whole: before the adapter was cut, at the best step and where it was trained again.
    """

    bench: Bench
    job: Job
    losses: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def __call__(self, progress: Any) -> None:
        if progress.stage == "training" and progress.done in self.job.marks:
            self.losses[str(progress.done)] = self.bench.verdict(self.job.style)
        elif progress.stage == "cutting" and not self.whole:  # the first call comes before any cut is tried
            self.whole["best step"] = self.bench.verdict(self.job.style)
        elif progress.stage == "training on all" and progress.done == progress.total:
            self.whole["refit"] = self.bench.verdict(self.job.style)


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


def finite(value: Any) -> Any:
    """The same with None for what JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value
