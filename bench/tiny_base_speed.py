"""Measure the speed of sampling and training with the tiny base on this machine.

    python -m bench.tiny_base_speed --host path/to/ComfyUI

Sampling: 20 Euler steps of 4 images with guidance 4. Training: a step of batch 4 on all layers, median of 20 after a
warm-up of 5. Writes bench/results/tiny_base_speed_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.training_session import make_config, training_session
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host


def sampling_seconds(model: Any, clip: Any) -> float:
    """Return the seconds for 20 steps of 4 images, after a warm-up run."""
    import comfy.sample

    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a rocket, noto style"))
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    latent = torch.zeros(4, 16, 16, 16)
    seconds = 0.0
    for seed in range(2):
        began = time.perf_counter()
        noise = comfy.sample.prepare_noise(latent, seed)
        comfy.sample.sample(model, noise, 20, 4.0, "euler", "normal", positive, negative, latent, disable_pbar=True)
        seconds = time.perf_counter() - began
    return seconds


def step_seconds(pack: Any, model: Any, clip: Any, batch: int = 4, timed: int = 20, warm_up: int = 5) -> float:
    """Return the median seconds of a training step."""
    latents = [{"samples": torch.randn(1, 16, 16, 16)} for _ in range(16)]
    caption = clip.encode_from_tokens_scheduled(clip.tokenize("a rocket"))
    config = make_config(pack, steps=timed + warm_up + 1, batch_size=batch, layers="all", mode="off")
    times: list[float] = []
    with training_session(pack, model, latents, [caption] * 16) as session:
        session.train(config, on_step=lambda _: times.append(time.perf_counter()))
    steps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return statistics.median(steps[warm_up:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiny_base_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    open_host(parser.parse_args().host)
    pack = load_pack()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        model, clip, _ = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        sampling, step = sampling_seconds(model, clip), step_seconds(pack, model, clip)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\nTiny base on {name}\n20 steps of 4 images: {sampling:.2f} s\ntraining step of batch 4: {step:.3f} s")
    path = ROOT / "bench" / "results" / f"tiny_base_speed_{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"device": name, "draw_seconds": sampling, "step_seconds": step}, indent=2) + "\n")


if __name__ == "__main__":
    main()
