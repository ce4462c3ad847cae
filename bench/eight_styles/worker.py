"""A worker process of the study: opens everything once, then draws and measures job by job."""

from __future__ import annotations

import base64
import io
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from bench.eight_styles.images import read_judge
from bench.eight_styles.jobs import Job
from bench.eight_styles.judging import Judge, Reference, load_classifier
from bench.eight_styles.stop_candidates import StopCandidates
from bench.eight_styles.studio import Studio, opened
from bench.pool import Place, Row
from bench.result_file import finite
from bench.training_session import make_config

CLASSIFIER = ".classifier.pt"  # beside the data file
SHOWN = 12  # test images of a cell that are kept for the figures
_HELD_OUT = 3  # further images, where candidates for the stop are watched


def serve(connection: Connection, place: Place) -> None:
    """Open everything, send a description, then answer each job with its row until None is received."""
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # read when CUDA is first used
    torch.set_num_threads(place.threads)
    with opened(place.host, place.data) as studio:
        device = studio.session.network.device
        judge = Judge(load_classifier(place.data.with_suffix(CLASSIFIER), device), device)
        bench = Bench(studio, judge, read_judge(place.data))
        connection.send({"device": studio.device_name, "torch": torch.__version__, "layers": len(studio.layers)})
        while (job := connection.recv()) is not None:
            connection.send(bench.run(job))


def encode(host: Path, data: Path) -> None:
    """Encode the images and captions of a file once, and compile the kernels that trainings use."""
    with opened(host, data) as studio:
        config = make_config(studio.pack, steps=4)
        indices = list(next(iter(studio.indices.values())).training)
        session = studio.session
        studio.core("training").train(session.network, session.images, config, indices=indices)


class Bench:
    """Runs jobs: trains, draws the test captions, and measures what was drawn."""

    def __init__(self, studio: Studio, judge: Judge, data: Any) -> None:
        self.studio, self.judge, self.data = studio, judge, data
        self._references: dict[tuple[str, int], Reference] = {}

    def run(self, job: Job) -> Row:
        """Run a job and return its row; if it fails, the row has the error instead of the numbers."""
        began = time.monotonic()
        try:
            row = self._results(job)
        except Exception as error:  # the other jobs are still worth running
            row = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-6)}
        return {**job.row(), **finite(row), "seconds": round(time.monotonic() - began, 2)}

    def _results(self, job: Job) -> Row:
        if job.kind == "base":
            return {"cells": {"": self.cell(job, self.studio.draw_verdict(job.style))}}
        if job.kind == "real":
            return {"cells": {"": self.cell(job, self.studio.real(job.style))}}
        if job.kind == "vae":
            return {"cells": {"": self.cell(job, self.studio.through_autoencoder(job.style))}}
        return self._library(job) if job.kind == "library" else self._training(job)

    def cell(self, job: Job, images: Tensor) -> dict[str, Any]:
        """Return the measures of drawn images, and for the first seed some of the images."""
        measures = self.judge.measures(self.judge.look(images), self.reference(job.style, job.images))
        return measures if job.seed else {**measures, "images": _strip(images[:SHOWN])}

    def reference(self, style: str, count: int) -> Reference:
        """Return what a style's images are compared with. No adapter may be on the model when it is first asked for."""
        if (style, count) not in self._references:
            look, studio = self.judge.look, self.studio
            self._references[style, count] = Reference(
                self.data.style_names.index(style),
                torch.tensor(self.data.concepts_of(studio.styles[style].verdict.captions)),
                look(studio.real(style)),
                look(studio.training_images(style, count)),
                look(studio.draw_verdict(style)),
            )
        return self._references[style, count]

    def _training(self, job: Job) -> Row:
        studio = self.studio
        self.reference(job.style, job.images)
        available = studio.indices[job.style].training
        indices, held_out = list(available[: job.images]), list(available[job.images : job.images + _HELD_OUT])
        watch = _Marks(job, lambda: self.cell(job, studio.draw_verdict(job.style)))
        candidates = StopCandidates(studio, indices, held_out) if job.watched else None
        if candidates:
            candidates.look(0)
            watch.also = candidates.look
        config = make_config(studio.pack, **{**job.settings, "seed": job.seed})
        session = studio.session
        result = studio.core("training").train(
            session.network,
            studio.training_set(job.style, job.mirrored),
            config,
            indices=indices,
            previews=watch.previews(studio.core("training").Previews),
        )
        watch.check()
        row = {"cells": watch.cells, **self._facts(result)}
        if config.steps not in job.marks or config.stop_early or config.smallest:
            row["cells"]["returned"] = self._with(result.adapter, job)
        for strength in job.strengths:
            row["cells"][f"strength {strength:g}"] = self._with(_scaled(result.adapter, strength), job)
        for rule in job.truncations:
            smaller = self._truncated(result.adapter, rule)
            row["cells"][rule] = {**self._with(smaller, job), **self._size(smaller)}
        if candidates:
            row["stop"] = candidates.results()
        return row

    def _with(self, adapter: Any, job: Job) -> dict[str, Any]:
        """Return the cell that an adapter draws."""
        studio, network = self.studio, self.studio.session.network
        lora = studio.core("lora")
        weights = lora.FlatParameters(adapter.layers, network.device, network.dtype)
        with lora.injected(studio.layers, weights.layers, network.is_unpatched):
            images = studio.draw_verdict(job.style)
        return self.cell(job, images)

    def _facts(self, result: Any) -> Row:
        report = result.report
        return {
            **self._size(result.adapter),
            "steps_run": report.facts.steps_run,
            "best_step": report.facts.best_step,
            "restarts": len(report.restarts),
            "losses": [round(loss, 4) for loss in report.losses[::10]],
            "validation": [list(point) for point in report.validation],
        }

    def _truncated(self, adapter: Any, rule: str) -> Any:
        files, method = self.studio.core("adapter"), self.studio.core("method")
        name, _, value = rule.partition(" ")
        layers = files.decompose(adapter)
        ranks = files.ranks_by_rule(layers, method.rank_rule(name, float(value or 0)))
        return files.truncate_to_ranks(adapter, layers, ranks)[0]

    def _size(self, adapter: Any) -> dict[str, float]:
        files, layers = self.studio.core("adapter"), adapter.layers.values()
        state = files.to_state_dict(files.with_dtype(adapter, torch.float16))
        mean_rank = sum(layer.rank for layer in layers) / len(layers)
        return {"bytes": len(safetensors.torch.save(state)), "mean_rank": mean_rank}

    def _library(self, job: Job) -> Row:
        from bench.eight_styles.libraries import train_library  # its packages are not needed by the other jobs

        studio = self.studio
        self.reference(job.style, job.images)
        watch = _Marks(job, lambda: self.cell(job, studio.draw_verdict(job.style)))
        indices = list(studio.indices[job.style].training[: job.images])
        session = studio.session
        result = train_library(
            job.name,
            session.network,
            session.images,
            studio.layers,
            indices,
            **job.settings,
            seed=job.seed,
            marks=job.marks,
            on_mark=watch.draw,
        )
        watch.check()
        return {"cells": watch.cells, "bytes": result.bytes, "parameters": result.parameters}


class _Marks:
    """Draws and measures at the marks of a job; an error ends the training's drawing, and is raised afterwards."""

    def __init__(self, job: Job, measure: Callable[[], dict[str, Any]]) -> None:
        self.job, self.measure = job, measure
        self.cells: dict[str, dict[str, Any]] = {}
        self.also: Callable[[int], None] = lambda step: None
        self._error: Exception | None = None

    def previews(self, kind: Any) -> Any:
        """Return previews that come at the marks, with the weights that would be returned there."""
        every = math.gcd(*self.job.marks) if self.job.marks else 10**9
        return kind(every=every, draw=self.draw, share=math.inf)

    def draw(self, step: int) -> None:
        """Measure, where the step is a mark."""
        if step not in self.job.marks or str(step) in self.cells or self._error:
            return
        try:
            self.cells[str(step)] = self.measure()
            self.also(step)
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise the error that ended the drawing, if there was one."""
        if self._error:
            raise self._error


def _scaled(adapter: Any, strength: float) -> Any:
    layers = {name: replace(layer, alpha=layer.alpha * strength) for name, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


def _strip(images: Tensor) -> str:
    """Return images side by side, 96 pixels high, as WEBP in base64."""
    small = torch.nn.functional.interpolate(images.permute(0, 3, 1, 2), (96, 96), mode="area")
    row = (torch.cat(list(small.permute(0, 2, 3, 1)), 1) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, "WEBP", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
