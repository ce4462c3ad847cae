"""A worker process: opens ComfyUI, the tiny base and the images once, then runs jobs."""

from __future__ import annotations

import importlib
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
from bench.no_search.jobs import Job
from bench.pool import Place, Row
from bench.result_file import finite
from bench.training_session import Session, make_config, training_session
from launcher.inprocess import load_pack, open_host

_SEED = 20_261  # of the test noise; no training uses it
_BATCH = 240  # test images at once


def serve(connection: Connection, place: Place) -> None:
    """Open everything, send a description, then answer each job with its row until None is received."""
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # read when CUDA is first used
    torch.set_num_threads(place.threads)
    with opened(place.host, place.data) as bench:
        connection.send({"device": bench.device_name, "torch": torch.__version__, "layers": bench.layer_count})
        while (job := connection.recv()) is not None:
            connection.send(bench.run(job))


@contextmanager
def opened(host: Path, data: Path) -> Iterator[Bench]:
    """Open the tiny base with the images of a file; their indices follow the order of the file."""
    open_host(host)
    pack = load_pack()
    latents: list[dict[str, torch.Tensor]] = []
    conditioning: list[Any] = []
    indices: dict[str, tuple[range, range]] = {}
    with torch.inference_mode():
        model, clip, vae = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        for name, style in images.read(data).items():
            parts = []
            for part in (style.training, style.verdict):
                parts.append(range(len(latents), len(latents) + len(part.captions)))
                samples = vae.encode(torch.from_numpy(part.images).float() / 255)
                latents += [{"samples": sample.clone()} for sample in samples.split(1)]
                conditioning += [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in part.captions]
            indices[name] = (parts[0], parts[1])
        with training_session(pack, model, latents, conditioning) as session:
            yield Bench(pack, session, indices)


class Bench:
    """The tiny base with the images of all styles. indices: style -> (training images, test images)."""

    def __init__(self, pack: ModuleType, session: Session, indices: dict[str, tuple[range, range]]) -> None:
        self.pack, self.session, self.indices = pack, session, indices
        core = f"{pack.__name__}.aclora_core"
        names = ("adapter", "lora", "lora.targets", "training.fixed_noise")
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
        """Run a job and return its row; if it fails, the row has the error instead of the numbers."""
        began = time.monotonic()
        try:
            row = {"loss": self.verdict(job.style)} if job.kind == "base" else self._trained(job)
        except Exception as error:  # the other jobs are still worth running
            row = {"error": f"{type(error).__name__}: {error}"}
        return {**job.row(), **finite(row), "seconds": round(time.monotonic() - began, 2)}

    def verdict(self, style: str) -> float:
        """Return the model's denoising loss on the test images of a style."""
        if style not in self._verdicts:
            validation_set = self.core["training.fixed_noise"].FixedNoiseImages
            self._verdicts[style] = validation_set(
                self.session.network, self.session.images, self.indices[style][1], _SEED, _BATCH
            )
        return float(self._verdicts[style].losses().mean())

    def verdict_with(self, adapter: Any, style: str) -> float:
        """Return the denoising loss on the test images with an adapter on the model."""
        network = self.session.network
        weights = self.core["lora"].FlatParameters(adapter.layers, network.device, network.dtype)
        with self.core["lora"].injected(self.layers, weights.layers, network.is_unpatched):
            return self.verdict(style)

    def _trained(self, job: Job) -> Row:
        config = make_config(self.pack, **job.settings)
        watch = Watch(self, job)
        result = self.session.train(config, on_step=watch, indices=self.indices[job.style][0])
        ranks = [layer.rank for layer in result.adapter.layers.values()]
        report = result.report
        return {
            "loss": self.verdict_with(result.adapter, job.style),
            "losses": watch.losses,
            "whole": watch.whole,
            "steps_run": report.facts.steps_run,
            "best_step": report.facts.best_step,
            "mean_rank": sum(ranks) / len(ranks),
            "bytes": self._file_size(result.adapter),
            "restarts": len(report.restarts),
            "kept": [mean([rank.kept_delta for rank in restart.layers.values()]) for restart in report.restarts],
            "validation": [list(point) for point in report.validation],
            "cut": next((cut.name for cut in report.truncations if cut.chosen), "whole"),
            "cuts": [[cut.name, cut.mean_rank, cut.size, cut.loss, cut.error] for cut in report.truncations],
        }

    def _file_size(self, adapter: Any) -> int:
        """Return the bytes of the adapter's file at Save AC-LoRA's default precision, without its report."""
        files = self.core["adapter"]
        return len(safetensors.torch.save(files.to_state_dict(files.with_dtype(adapter, torch.float16))))


@dataclass
class Watch:
    """Measure the loss on the test images during a training, without any effect on the training.

    losses: at the job's marks. whole: before truncation, at the best step and after the refit.
    """

    bench: Bench
    job: Job
    losses: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def __call__(self, progress: Any) -> None:
        if progress.stage == "training" and progress.done in self.job.marks:
            self.losses[str(progress.done)] = self.bench.verdict(self.job.style)
        elif progress.stage == "cutting" and not self.whole:  # the first call comes before any truncation is tried
            self.whole["best step"] = self.bench.verdict(self.job.style)
        elif progress.stage == "training on all" and progress.done == progress.total:
            self.whole["refit"] = self.bench.verdict(self.job.style)


def mean(values: list[int]) -> float:
    return sum(values) / len(values)
