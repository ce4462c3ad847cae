"""Measure the denoising loss of the quickstart's adapter on images of the style that it was not trained on.

    python -m bench.held_out_loss --host path/to/ComfyUI

Trains as the quickstart does, on its 16 images, and measures the denoising loss of 100 other images of the style at
fixed noise and noise levels, before and after. Writes bench/results/held_out_loss.json. Needs npm for the icons.
--weights fp16 runs the tiny base in float16, which takes twenty times as long on a CPU, and writes no file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.training_session import training_session
from launcher.environment import ROOT
from launcher.inprocess import load_pack, open_host
from tools.tiny_base import icons

STYLE = "fluent-emoji-high-contrast"
PROMPT = ROOT / "tests" / "prompts" / "quickstart.json"


def unseen_images(cache: Path, count: int, seed: int) -> list[tuple[torch.Tensor, str]]:
    """Return images (1, 128, 128, 3) in 0..1 of the style with their captions, none of them shipped with the pack."""
    shipped = {path.read_text(encoding="utf-8").strip() for path in (ROOT / "workflows").rglob(f"{STYLE}/*.txt")}
    drawn = icons.load_set(cache, STYLE)
    known = icons.load_set(cache, icons.REFERENCE)
    captions = {concept: icons.caption(concept, "").rsplit(",", 1)[0] for concept in drawn if concept in known}
    free = sorted(concept for concept, caption in captions.items() if caption not in shipped)
    chosen = random.Random(seed).sample(free, count)
    images = icons.render_many([drawn[concept] for concept in chosen])
    return [
        (torch.from_numpy(image.copy()).float()[None] / 255, captions[concept])
        for image, concept in zip(images, chosen, strict=True)
    ]


def measure(pack: Any, images: list[tuple[torch.Tensor, str]], seeds: list[int], half: bool) -> dict[str, Any]:
    """Return the loss of the base and of an adapter for each seed. half: whether the base is in float16."""
    nodes = pack.nodes
    validation = importlib.import_module(f"{pack.__name__}.aclora_core.training.validation")
    settings = quickstart_settings()
    with torch.inference_mode():
        model, clip, vae = nodes.tiny_base.ACLoRATinyBase.execute().result
        if half:
            model.model.diffusion_model.half().dtype = torch.float16
        dataset = settings.pop("dataset")
        latents, conditioning = nodes.dataset.node.ACLoRADataset.execute(vae=vae, clip=clip, **dataset).result
        held = [{"samples": vae.encode(image)} for image, _ in images]
        captions = [clip.encode_from_tokens_scheduled(clip.tokenize(caption)) for _, caption in images]

        def loss(candidate: Any) -> float:
            with training_session(pack, candidate, held, captions) as session:
                return validation.mean_denoising_loss(session.network, session.images, range(len(held)), seed=0)

        result: dict[str, Any] = {"base": loss(model), "adapted": {}, "seconds": [], "measuring": []}
        for seed in seeds:
            began = time.monotonic()
            widgets = {name: [value] for name, value in {**settings, "seed": seed}.items()}
            trained, _, _, report, _ = nodes.training.node.ACLoRATrain.execute(
                model=[model], latents=latents, conditioning=conditioning, **widgets
            ).result
            result["seconds"].append(round(time.monotonic() - began, 1))
            result["measuring"].append(report.facts.validation_seconds)
            result["adapted"][seed] = loss(trained)
    return result


def quickstart_settings() -> dict[str, Any]:
    """Return the widgets of the quickstart's training node, and under "dataset" those of its dataset node."""
    prompt = json.loads(PROMPT.read_text(encoding="utf-8")).values()

    def widgets(kind: str) -> dict[str, Any]:
        inputs = next(node["inputs"] for node in prompt if node["class_type"] == kind)
        return {name: value for name, value in inputs.items() if not isinstance(value, list)}

    return {**widgets("ACLoRATrain"), "dataset": widgets("ACLoRADataset")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.held_out_loss", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", type=Path, default=Path(".runtime/ComfyUI"))
    parser.add_argument("--icons", type=Path, default=Path(".runtime/icons"), help="folder for the icon packages")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument(
        "--weights", choices=["as they are", "fp16"], default="as they are", help="dtype of the tiny base"
    )
    args = parser.parse_args()
    icons.fetch(args.icons, [STYLE, icons.REFERENCE])
    open_host(args.host)
    half = args.weights == "fp16"
    result = measure(load_pack(), unseen_images(args.icons, args.images, seed=0), args.seeds, half)
    print(f"\nDenoising loss over {args.images} unseen images of {STYLE}")
    print(f"{'':12}{'loss':>8}{'of the base':>14}")
    print(f"{'base':12}{result['base']:8.4f}{1:14.1%}")
    for seed, loss in result["adapted"].items():
        print(f"{f'seed {seed}':12}{loss:8.4f}{loss / result['base']:14.1%}")
    ratio = statistics.median(result["adapted"].values()) / result["base"]
    print(f"median: {1 - ratio:.1%} lower; {statistics.median(result['seconds']):.0f} s of training each")
    share = sum(result["measuring"]) / sum(result["seconds"])
    print(f"validation took {share:.1%} of the training time")
    if half:
        return
    path = ROOT / "bench" / "results" / "held_out_loss.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**result, "style": STYLE, "pictures": args.images}, indent=2) + "\n")


if __name__ == "__main__":
    main()
