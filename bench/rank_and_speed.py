"""Measure which scaling of a LoRA makes its learning speed independent of the rank.

    python -m bench.rank_and_speed --host path/to/ComfyUI [--steps 5 15 40]

Trains the tiny base on the quickstart's images for the same few steps at ranks 2 to 64, without restarts, with three
rules for the scale in delta = scale · up · down. Prints by how much the loss on these images has fallen (at fixed noise
and noise levels) and the norm of the final delta. With an ideal rule the loss falls by the same amount at every rank.
Writes bench/results/rank_and_speed.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.quickstart import quickstart_settings
from bench.training_session import Session, make_config, training_session
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host

RANKS = [2, 4, 8, 16, 32, 64]
# alpha as a function of the rank; the scale is alpha / rank. All have scale 1/2 at rank 16, the pack's default.
SCALINGS: dict[str, Callable[[int], float]] = {
    "8 / rank (alpha = 8)": lambda rank: 8.0,
    "2 / √rank (rsLoRA)": lambda rank: 2.0 * math.sqrt(rank),
    "1/2 (alpha = rank / 2)": lambda rank: rank / 2.0,
}
SETTINGS = {
    "learning_rate": 5e-4,
    "batch_size": 4,
    "layers": "attention and feed-forward",
    "timesteps": "logit-normal",
    "mode": "off",
    "held_out": 0.0,
    "stop_early": False,
    "smallest": False,
    "seed": 7,
}


class Bench:
    """The tiny base and the quickstart's images, ready for many trainings."""

    def __init__(self, pack: Any) -> None:
        self.pack = pack
        self.fixed_noise = importlib.import_module(f"{pack.__name__}.aclora_core.training.fixed_noise")
        self.model, clip, vae = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        dataset = pack.nodes.dataset.node.ACLoRADataset
        self.images = dataset.execute(vae=vae, clip=clip, **quickstart_settings()["dataset"]).result
        with training_session(pack, self.model, *self.images) as session:
            self.base_loss = self.loss(session)

    def loss(self, session: Session) -> float:
        """Return the denoising loss of the model as it is now, over all images."""
        return self.fixed_noise.mean_denoising_loss(session.network, session.images, range(len(self.images[0])), seed=0)

    def run(self, rank: int, alpha: float, marks: Sequence[int]) -> dict[str, Any]:
        """Train once; return the share of the base's loss that is gone at each mark, and ‖ΔW‖ over all layers."""
        settings = {**SETTINGS, "steps": max(marks), "max_rank": rank, "alpha": alpha}
        falls = {}
        with training_session(self.pack, self.model, *self.images) as session:

            def record(progress: Any) -> None:
                if progress.done in marks:
                    falls[progress.done] = 1.0 - self.loss(session) / self.base_loss

            result = session.train(make_config(self.pack, **settings), on_step=record)
        size = math.sqrt(sum(d * d for values in result.report.spectrum.values() for d in values))
        return {"alpha": alpha, "falls": falls, "delta": size}


def spread(values: Sequence[float]) -> float:
    """Return the largest value over the smallest; infinity if one is not above zero."""
    return max(values) / min(values) if min(values) > 0 else math.inf


def compare(bench: Bench, ranks: list[int], marks: list[int]) -> dict[str, Any]:
    """Print a row for each scaling and number of steps, and one for the norm of the delta; return the numbers."""
    columns = ["scale", "steps", *(f"rank {rank}" for rank in ranks), "largest / smallest"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    table = {}
    for label, alpha in SCALINGS.items():
        runs = table[label] = {rank: bench.run(rank, alpha(rank), marks) for rank in ranks}
        for mark in marks:
            falls = [run["falls"][mark] for run in runs.values()]
            print(f"| {label} | {mark} | {' | '.join(f'{fall:.1%}' for fall in falls)} | {spread(falls):.2f} |")
        sizes = [run["delta"] for run in runs.values()]
        cells = " | ".join(f"{size:.2f}" for size in sizes)
        print(f"| {label} | ‖ΔW‖ after {max(marks)} | {cells} | {spread(sizes):.2f} |", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rank_and_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 15, 40])
    args = parser.parse_args()
    open_host(args.host)
    with torch.inference_mode():
        bench = Bench(load_pack())
        print(f"\nLoss of the tiny base {bench.base_loss:.4f}; share of it that is gone after each number of steps\n")
        table = compare(bench, args.ranks, sorted(args.steps))
    result = {"base": bench.base_loss, **bench.same, "scalings": table}
    path = ROOT / "bench" / "results" / "rank_and_speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
