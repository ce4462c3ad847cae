"""Trainings on a small network that one process or several do, and a program that torchrun starts several times.

    torchrun --nproc-per-node N -m tests.support.shared_training FOLDER CASE …

Each process writes what it got to FOLDER/CASE-rank.pt; a failure's sentence in place of a result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aclora_core.adapter import Restart
from aclora_core.config import CheckpointConfig, TrainConfig
from aclora_core.diffusion import SimpleModel, SimpleTrainingSet
from aclora_core.distributed import ALONE, Processes, join
from aclora_core.training import Previews, learned_style, train
from launcher.environment import ROOT
from tests.support.toy import FLOW

QUICK = TrainConfig(
    steps=12, learning_rate=0.02, batch_size=2, max_rank=4, alpha=4.0, layers="all", smallest=False, checkpointing="off"
)
RESTARTS = replace(QUICK, mode="product", restart_steps=4, threshold="fixed", steps=11)
HELD = replace(RESTARTS, held_out=0.25, steps=30, stop_early=False, refit=True, smallest=True)
RATES = {"AdamW": 0.02, "Adafactor": 0.02, "SGD": 0.1, "Prodigy": 1.0, "AdamWScheduleFree": 0.02, "AdamW8bit": 0.02}
# A batch of two images for each process, unless a case says otherwise.
CASES: dict[str, TrainConfig] = {
    **{f"optimizer {name}": replace(QUICK, optimizer=name, learning_rate=rate) for name, rate in RATES.items()},  # type: ignore[arg-type]
    "accumulation": replace(QUICK, accumulate=3),
    "restarts": RESTARTS,
    "restarts by the noise floor": replace(RESTARTS, threshold="noise floor", mode="paper"),
    "EMA": replace(QUICK, ema_decay=0.9),
    "schedule": replace(QUICK, schedule="cosine", warm_up=3, weight_decay=0.1, max_norm=0.05),
    "sizes": replace(QUICK, batch_size=3),
    "masks": replace(QUICK, mask_floor=0.1),
    "regularisation": replace(QUICK, stratified_timesteps=True),
    "empty captions": replace(QUICK, caption_dropout=0.3, prior_weight=0.5),
    "loss weights": replace(QUICK, loss_weight="min-SNR"),
    "text encoder": replace(QUICK, text_learning=0.5),
    "held-out images": HELD,
    "fewer images than processes": replace(QUICK, batch_size=1, steps=20),
    "truncation": replace(QUICK, smallest=True),
}


@dataclass
class EncodedCaptions(SimpleTrainingSet):
    """A training set whose captions a text encoder encodes anew, with its gradient history."""

    encoder: nn.Module = field(default_factory=nn.Identity)

    def conditioning(self, indices: Sequence[int]) -> Tensor:
        return self.encoder(super().conditioning(indices))


def captioned_model() -> SimpleModel:
    """A network whose prediction depends on its caption, of three numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(8 + 1 + 3, 16), nn.SiLU(), nn.Linear(16, 8)).requires_grad_(False)

    def predict(noisy: Tensor, sigma: Tensor, captions: Tensor) -> Tensor:
        rows = torch.cat([noisy.flatten(1), sigma[:, None], captions.flatten(1)], dim=1)
        return network(rows).view(noisy.shape)

    return SimpleModel(network, FLOW, predict)


def inputs(case: str) -> tuple[SimpleModel, SimpleTrainingSet]:
    """Return the model and the images of a case."""
    generator = torch.Generator().manual_seed(1)
    model, count = captioned_model(), 3 if case.startswith("fewer") else 13
    style = 2 * torch.randn(1, 2, 2, 2, generator=generator)  # which all images have in common
    latents = [style + 0.3 * image for image in torch.randn(count, 1, 2, 2, 2, generator=generator).unbind()]
    captions = list(torch.randn(count, 1, 3, generator=generator).unbind())
    images = SimpleTrainingSet(latents, captions)
    if case == "sizes":
        images.latents = [x if n % 3 else x.reshape(1, 2, 4, 1) for n, x in enumerate(latents)]
    if case == "masks":
        images.masks = {n: torch.rand(1, 1, 2, 2, generator=generator) for n in range(0, 13, 2)}
    if case == "regularisation":
        images.regularisation = {0: 0.5, 5: 0.25, 6: 0.5}
    if case == "empty captions":
        images = images.with_unconditional(torch.full((1, 3), -1.0))
    if case == "text encoder":
        with torch.random.fork_rng():
            torch.manual_seed(4)
            encoder = nn.ModuleDict({"fc1": nn.Linear(3, 3)}).requires_grad_(False)
        encoder.forward = lambda rows: encoder["fc1"](rows)  # type: ignore[method-assign]
        model.text_encoders = {"text_encoders.": encoder}
        images = EncodedCaptions(latents, captions, encoder=encoder)
    return model, images


def result_of(case: str, config: TrainConfig, processes: Processes = ALONE, **named: Any) -> dict[str, Any]:
    """Return the numbers of a training: its factors, losses, restarts and measurements."""
    model, images = named.pop("inputs", None) or inputs(case)
    result = train(model, images, config, processes=processes, **named)
    report = result.report
    factors = {
        f"{name} {part}": getattr(layer, part)
        for name, layer in result.adapter.layers.items()
        for part in ("lora_down", "lora_up")
    }
    return {
        "factors": factors,
        "losses": report.losses,
        "validation": report.validation,
        "fit": report.fit,
        "ranks": [_kept(restart) for restart in report.restarts],
        "best": report.facts.best_step,
        "truncations": [(row.loss, row.chosen) for row in report.truncations],
        "epochs": report.facts.epochs,
        "notes": report.facts.notes,
        "cancelled": report.facts.cancelled,
        "skipped": sum(loss != loss for loss in report.losses),
        "unseen": [getattr(report.facts, name) for name in ("unseen_prompts", "style_gained", "content_kept")],
    }


def _kept(restart: Restart) -> list[int]:
    return [kept for it in restart.layers.values() for kept in (it.kept_down, it.kept_up, it.kept_delta)]


def spoiled(at: Callable[[int], bool], spoil: Callable[[Tensor], Tensor]) -> tuple[SimpleModel, SimpleTrainingSet]:
    """Return model and images, where the outputs of those calls with a gradient go through `spoil`."""
    model, images = inputs("")
    predict, calls = model.predict, []

    def spoiling(noisy: Tensor, sigma: Tensor, captions: Tensor) -> Tensor:
        output = predict(noisy, sigma, captions)
        if torch.is_grad_enabled():
            calls.append(len(noisy))
            if at(len(calls)):
                return spoil(output)
        return output

    model.predict = spoiling
    return model, images


def _fail(output: Tensor) -> Tensor:
    raise ValueError("this process cannot go on")


def _run_out_of_memory(output: Tensor) -> Tensor:
    if len(output) > 1:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return output


def _die(output: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return output


def special(case: str, processes: Processes, folder: Path) -> dict[str, Any]:
    """Run a case in which the last process does something of its own."""
    last, seen = processes.rank == processes.size - 1, []
    automatic = replace(QUICK, checkpointing="automatic")
    if case == "failure":
        return result_of(case, QUICK, processes, inputs=spoiled(lambda call: last and call == 5, _fail))
    if case == "death":
        return result_of(case, QUICK, processes, inputs=spoiled(lambda call: last and call == 5, _die))
    if case == "no number":
        return result_of(
            case, QUICK, processes, inputs=spoiled(lambda call: last and call == 5, lambda it: it * torch.nan)
        )
    if case == "memory":
        return result_of(
            case, automatic, processes, inputs=spoiled(lambda call: last and call >= 5, _run_out_of_memory)
        )
    if case == "previews":
        return drawing(processes, replace(automatic, batch_size=4 // processes.size))
    if case == "unseen prompts":
        return drawing_unseen_prompts(processes, replace(QUICK, max_rank=2, batch_size=4 // processes.size))
    if case == "cancel":
        return result_of(case, QUICK, processes, on_step=seen.append, should_stop=lambda: last and len(seen) == 4)
    if case == "failing refit":
        return result_of(case, HELD, processes, inputs=spoiled(lambda call: last and call == 40, _fail))
    checkpoints = CheckpointConfig(folder / "checkpoints" if processes.is_first else folder / "nothing", every=5)
    if case == "to resume":  # stops before its end
        config = replace(RESTARTS, batch_size=4 // processes.size)
        return result_of(
            "", config, processes, checkpoints=checkpoints, on_step=seen.append, should_stop=lambda: len(seen) == 7
        )
    assert case == "resumed", case
    return result_of("", replace(RESTARTS, batch_size=4 // processes.size), processes, checkpoints=checkpoints)


def drawing(processes: Processes, config: TrainConfig) -> dict[str, Any]:
    """Draw five previews together every three steps, with the EMA of the weights, and tell who has drawn which."""
    model, images = inputs("")
    sets: list[Any] = []

    def draw(done: int) -> list[Tensor]:
        with processes.failing_together():
            if processes.is_first:
                processes.call_for_help(done)
            own = []
            for number in processes.share(range(5)):
                noise = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(number))
                own.append(model.denoise(noise, torch.ones(1), images.conditioning([number])))
                if done == 9 and processes.rank == processes.size - 1:
                    raise ValueError("no sampler")
            drawn = [image for share in processes.gather(own) for image in share]
        sets.append((done, len(own), torch.stack(drawn)))
        return drawn

    result = result_of(
        "", replace(config, ema_decay=0.8), processes, inputs=(model, images), previews=Previews(3, draw)
    )
    return result | {"sets": sets}


def model_with_blocks() -> SimpleModel:
    """A network of blocks over tokens, whose prediction is shifted by its caption."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2)) for _ in range(3))
    network = nn.ModuleDict({"blocks": blocks}).requires_grad_(False)

    def predict(noisy: Tensor, sigma: Tensor, captions: Tensor) -> Tensor:
        tokens = noisy.flatten(2).transpose(1, 2)
        for block in network["blocks"]:
            tokens = tokens + block(tokens)
        return tokens.transpose(1, 2).reshape(noisy.shape) + 0.1 * captions[:, :2, None, None]

    return SimpleModel(network, FLOW, predict)


def drawing_unseen_prompts(processes: Processes, config: TrainConfig) -> dict[str, Any]:
    """Measure three prompts that were not learned, and tell how many drawings this process has made."""
    _, images = inputs("")
    captions = torch.randn(16, 1, 3, generator=torch.Generator().manual_seed(6)).unbind()
    latents = [*images.latents, *[torch.zeros(1, 2, 2, 2)] * 3]
    unseen = SimpleTrainingSet(latents, list(captions), prompts=range(13, 16))
    own, drawn = learned_style.draw_latents, list[int]()

    def counting(model: Any, noise: Tensor, *rest: Any) -> Tensor:
        drawn.append(len(noise))
        return own(model, noise, *rest)

    learned_style.draw_latents = counting
    try:
        result = result_of("", config, processes, inputs=(model_with_blocks(), unseen))
    finally:
        learned_style.draw_latents = own
    return result | {"drawn": sum(drawn)}


def launch(folder: Path, cases: Sequence[str], size: int = 2, patience: float = 300) -> tuple[int, str]:
    """Run cases in several processes. Return torchrun's exit code and all output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["-m", "tests.support.shared_training", str(folder), *cases]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=patience)
    return run.returncode, run.stdout + run.stderr


def read(folder: Path, case: str, rank: int) -> Any:
    """Return what a process got: a result, or the sentence of its failure."""
    return torch.load(folder / f"{case}-{rank}.pt")


def main(folder: Path, cases: Sequence[str]) -> None:
    torch.set_num_threads(1)
    processes = join()
    for case in cases:
        try:
            got: Any = result_of(case, CASES[case], processes) if case in CASES else special(case, processes, folder)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        torch.save(got, folder / f"{case}-{processes.rank}.pt")
    sys.stdout.write(json.dumps({"rank": processes.rank, "size": processes.size}) + "\n")
    torch.distributed.destroy_process_group()  # before Python ends: its threads may not outlive what they use


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
