"""Train the tiny base model from scratch: images, autoencoder, vocabulary, denoiser, evaluation, model card.

    python -m tools.tiny_base --host path/to/ComfyUI        # one CUDA GPU, under half an hour on an H100
    python -m tools.tiny_base --prepare FILE                # the images in one file, for --data where npm is missing
    python -m tools.tiny_base --host path/to/ComfyUI --start assets/tiny_base --derived --fit --seconds 420 --out FOLDER

Intermediate results are kept in --work, so an interrupted run resumes. With --seconds the run stops after that time and
exits with code 3; the same command then resumes it. With --fit it makes fewer steps instead.

The last command goes on from a finished base, with its autoencoder and vocabulary, and teaches it the styles of
derived_styles.py beside the icon sets.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.inprocess import open_host
from tools.tiny_base import autoencoder, card, denoiser, icons, image_file, judge, text
from tools.tiny_base.derived_styles import DERIVED, Derivation, style_words

log = logging.getLogger("aclora.tiny_base")
WORDINGS = ("{caption}", "{caption}", "{concept}, {style} style", "{style} style {concept}", "{plain}", "{style} style")
DERIVED_SHARE = 0.6  # of the training's images, with --derived
GRID_CONCEPTS = ["rocket", "guitar", "house", "dog face", "bicycle", "cactus", "castle", "octopus"]


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description=__doc__.split("\n")[0])
    parser.add_argument("--host", type=Path, help="folder of ComfyUI, whose modules are trained")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="only write the images into FILE, for --data")
    parser.add_argument("--data", type=Path, metavar="FILE", help="the images, instead of those drawn from --icons")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny_base"))
    parser.add_argument("--work", type=Path, default=Path(".runtime/tiny_base"), help="folder of intermediate results")
    parser.add_argument("--icons", type=Path, default=Path(".runtime/icons"), help="folder of the icon packages")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit up to the written weights")
    parser.add_argument("--fit", action="store_true", help="shorten the denoiser's training to the time limit")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="a finished base to go on from")
    parser.add_argument("--derived", action="store_true", help="train on the derived styles too")
    parser.add_argument("--autoencoder-steps", type=int, default=6000)
    parser.add_argument("--denoiser-steps", type=int, default=18000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--judge-prompts", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the denoiser's training, at its highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concepts", type=int, help="train on this many concepts only, to try the script")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if not (args.host or args.prepare):
        parser.error("--host is needed: the folder of ComfyUI")
    return args


def draw_images(cache: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Fetch the icon sets and draw the base's images; return them with their concepts and style words."""
    icons.fetch(cache, icons.BASE_STYLES)
    return icons.base_images(cache)


def to_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 (n, h, w, 3) to float16 (n, 3, h, w) in 0..1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).half().div_(255)


def make_autoencoder(images: Tensor, args: argparse.Namespace) -> torch.nn.Module:
    """Load the autoencoder of --start or from --work, or train it and save it there."""
    path = (args.start or args.work) / "autoencoder.safetensors"
    if path.is_file():
        model = autoencoder.build().to(images.device)
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return model.eval().requires_grad_(False)
    batch = min(128, len(images))
    model = autoencoder.train(images, args.autoencoder_steps, batch, args.seed, progress("autoencoder"))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return model


def progress(name: str):
    """Return a callback that logs every 500th step."""
    started = time.monotonic()

    def show(step: int, loss: float) -> None:
        if step % 500 == 0:
            log.info("%s: step %d, loss %.4f, %.0f s", name, step, loss, time.monotonic() - started)

    return show


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale each image down and shift it at random by a little, with white at the edges."""
    n = len(images)
    zoom = 0.9 + 0.1 * torch.rand(n, generator=generator)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
    theta[:, :, 2] = 0.08 * (torch.rand(n, 2, generator=generator) - 0.5)
    grid = torch.nn.functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return 1 - torch.nn.functional.grid_sample(1 - images.float(), grid, align_corners=False)


def all_latents(model: torch.nn.Module, images: Tensor, seed: int, derive: Derivation, variants: int) -> Tensor:
    """Encode the images as they are and jittered, each drawn in a style: (variants, n, 16, h/8, w/8)."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for variant in range(variants):
        chosen = (part.float() if variant == 0 else jittered(part, generator) for part in images.split(512))
        parts.append(torch.cat([autoencoder.encode(model, derive(part)).half() for part in chosen]))
    return torch.stack(parts)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What the denoiser learns: the images of the icon sets, and after them those in derived styles."""

    latents: Tensor  # float16 (variants, n, c, h, w)
    concepts: list[str]  # n
    styles: list[str]  # n, as captions name them
    odds: Tensor  # (n,), how often each image is drawn, relative to the others


def training_set(
    model: torch.nn.Module, images: Tensor, concepts: list[str], styles: list[str], derived: Sequence[str], seed: int
) -> TrainingSet:
    """Encode all images and list their captions.

    derived: names of derived styles, in each of which every image is drawn once more.
    """
    variants = 2 if derived else 4  # with so many styles each image is seen less often
    latents, words = [all_latents(model, images, seed, lambda part: part, variants)], [styles]
    for number, name in enumerate(derived, 1):
        latents.append(all_latents(model, images, seed + number, DERIVED[name], variants))
        words.append([style_words(style, name) for style in styles])
    shares = [1 - DERIVED_SHARE if derived else 1.0, *[DERIVED_SHARE / len(derived) for _ in derived]]
    odds = torch.tensor(shares, device=images.device).repeat_interleave(len(images))
    every_style = [style for row in words for style in row]
    return TrainingSet(torch.cat(latents, 1), concepts * len(words), every_style, odds)


def all_wordings(concepts: list[str], styles: list[str]) -> list[list[str]]:
    """Return the captions of all images in every wording."""
    rows = []
    for wording in WORDINGS:
        row = []
        for concept, style in zip(concepts, styles, strict=True):
            full = icons.caption(concept, style)
            row.append(wording.format(caption=full, plain=full.rsplit(",", 1)[0], concept=concept, style=style))
        rows.append(row)
    return rows


def write_weights(pair: denoiser.Pair, vae: torch.nn.Module, config: dict, out: Path) -> None:
    """Write the three models in float16, with the key names that ComfyUI's loaders read."""

    def half(module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
        return {prefix + name: value.half().cpu().contiguous() for name, value in module.state_dict().items()}

    save_file(half(pair.denoiser), out / "denoiser.safetensors", {"format": "pt"})
    save_file(half(pair.text), out / "text_encoder.safetensors", {"format": "pt"})
    save_file(half(vae), out / "autoencoder.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps({"text": config, "length": text.LENGTH}, indent=2) + "\n")


def started_pair(folder: Path, config: dict) -> denoiser.Pair:
    """Return the denoiser and text encoder of a finished base, in float32."""
    pair = denoiser.Pair(autoencoder.CHANNELS, config)
    for module, name in ((pair.denoiser, "denoiser"), (pair.text, "text_encoder")):
        module.load_state_dict({key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()})
    return pair


def read_weights(pair: denoiser.Pair, vae: torch.nn.Module, out: Path) -> None:
    """Load the written weights, so that the shipped weights are evaluated."""
    for module, name in ((pair.denoiser, "denoiser"), (pair.text, "text_encoder"), (vae, "autoencoder")):
        module.load_state_dict({key: value.float() for key, value in load_file(out / f"{name}.safetensors").items()})


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    args = parse_options()
    if args.prepare:
        image_file.write(args.prepare, *draw_images(args.icons))
        return 0
    open_host(args.host)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    raw, concepts, styles = image_file.read(args.data) if args.data else draw_images(args.icons)
    if args.concepts:
        kept = set(random.Random(args.seed).sample(sorted(set(concepts)), args.concepts))
        chosen = [number for number, concept in enumerate(concepts) if concept in kept]
        raw, concepts, styles = raw[chosen], [concepts[i] for i in chosen], [styles[i] for i in chosen]
    images = to_tensor(raw, device)
    log.info("images: %d drawn, %.0f s", len(images), time.monotonic() - started)
    vae = make_autoencoder(images, args)
    quality = autoencoder.psnr(vae, images[:: max(1, len(images) // 1000)])
    log.info("autoencoder: %.1f dB on the base images, %.0f s", quality, time.monotonic() - started)

    learned = training_set(vae, images, concepts, styles, tuple(DERIVED) if args.derived else (), args.seed)
    log.info("training set: %d images encoded, %.0f s", learned.latents.shape[1], time.monotonic() - started)
    rows = all_wordings(learned.concepts, learned.styles)
    folder = args.out / "tokenizer"
    if args.start:
        shutil.copytree(args.start / "tokenizer", folder, dirs_exist_ok=True)
    else:
        text.learn_vocabulary(sorted({caption for row in rows for caption in row}), 3000, folder)
    tokenizer = text.load_tokenizer(folder)
    config = text.text_config(len(tokenizer))
    tokens = torch.stack([text.tokenize(tokenizer, row) for row in rows]).to(device)
    empty = text.tokenize(tokenizer, [""])[0].to(device)
    schedule = denoiser.Schedule(args.denoiser_steps, args.batch, args.learning_rate)
    left = args.seconds - (time.monotonic() - started)
    pair = denoiser.train(
        learned.latents,
        tokens,
        empty,
        config,
        schedule,
        args.seed,
        args.work / "denoiser.pt",
        left,
        not args.no_compile,
        progress("denoiser"),
        odds=learned.odds if args.derived else None,
        start=started_pair(args.start, config) if args.start else None,
        fit=args.fit,
    )
    if pair is None:
        log.info("stopped after %.0f s; run the same command again to resume", time.monotonic() - started)
        return 3
    write_weights(pair, vae, config, args.out)
    read_weights(pair, vae, args.out)
    log.info("weights written, %.0f s", time.monotonic() - started)
    report = verdict(pair, vae, tokenizer, images, concepts, styles, args)
    report |= {"autoencoder_psnr": quality, "pictures": len(images), "concepts": len(set(concepts))}
    report |= {"arguments": arguments(args)}
    (args.out / "verdict.json").write_text(json.dumps(report, indent=2) + "\n")
    card.write(args.out, report)
    log.info("%s\n%.0f s", json.dumps(report, indent=2), time.monotonic() - started)
    return 0


def arguments(args: argparse.Namespace) -> dict:
    """Return what the model card says of the training; "before" has the same of the base it went on from."""
    found = {key: getattr(args, key) for key in ("autoencoder_steps", "denoiser_steps", "batch", "seed")}
    found["denoiser_steps"] = torch.load(args.work / "denoiser.pt", mmap=True, map_location="cpu")["step"]
    if args.start:
        found["before"] = json.loads((args.start / "verdict.json").read_text())["arguments"]
        found["autoencoder_steps"] = found["before"]["autoencoder_steps"]
    return found


def verdict(pair, vae, tokenizer, images: Tensor, concepts: list[str], styles: list[str], args) -> dict:
    """Generate images of base concepts and evaluate them; save the model card's grid."""
    device = images.device
    words, kinds = sorted(set(concepts)), sorted(set(styles))
    concept_class = torch.tensor([words.index(c) for c in concepts], device=device)
    style_class = torch.tensor([kinds.index(s) for s in styles], device=device)
    classifier = judge.train(images, concept_class, style_class, args.judge_steps, args.seed)
    known = {kind: {c for c, s in zip(concepts, styles, strict=True) if s == kind} for kind in kinds}
    everywhere = sorted(set.intersection(*known.values()))
    chosen = random.Random(args.seed).sample(everywhere, min(args.judge_prompts, len(everywhere)))
    asked = [(concept, kinds[number % len(kinds)]) for number, concept in enumerate(chosen)]
    empty = text.tokenize(tokenizer, [""])[0].to(device)

    def draw(prompts: list[tuple[str, str]]) -> Tensor:
        tokens = text.tokenize(tokenizer, [icons.caption(*prompt) for prompt in prompts]).to(device)
        parts = []
        for number, part in enumerate(tokens.split(50)):
            latents = denoiser.sample(pair, part, empty, (autoencoder.CHANNELS, 16, 16), args.seed + number)
            parts.append(autoencoder.decode(vae, latents))
        return torch.cat(parts)

    wanted = [torch.tensor([names.index(a[k]) for a in asked], device=device) for k, names in ((0, words), (1, kinds))]
    real = torch.cat([images[(concept_class == c) & (style_class == s)][:1] for c, s in zip(*wanted, strict=True)])
    grid = [(concept, style) for style in kinds for concept in GRID_CONCEPTS]
    card.save_grid(draw(grid), len(GRID_CONCEPTS), args.out / "grid.png")
    if args.derived:
        grid = [(concept, style_words(kinds[0], name)) for name in DERIVED for concept in GRID_CONCEPTS]
        card.save_grid(draw(grid), len(GRID_CONCEPTS), args.out / "derived.png")
    return {
        "prompts": len(asked),
        "generated": asdict(judge.judge(classifier, draw(asked), *wanted)),
        "real": asdict(judge.judge(classifier, real, *wanted)),
        "held_out_psnr": held_out_psnr(vae, args.icons, device) or known_psnr(args.start),
        "derived": list(DERIVED) if args.derived else [],
    }


def held_out_psnr(vae: torch.nn.Module, cache: Path, device: torch.device) -> dict[str, float]:
    """Return the autoencoder's PSNR on held-out styles, for those whose package is in the folder."""
    result = {}
    for key, style in icons.HELD_OUT_STYLES.items():
        if (cache / style.archive).is_file():
            images, _ = icons.held_out_images(cache, key)
            result[key] = round(autoencoder.psnr(vae, to_tensor(images[:200], device)), 1)
    return result


def known_psnr(start: Path | None) -> dict[str, float]:
    """Return the PSNR on held-out styles that the base has which a training went on from, with its autoencoder."""
    return json.loads((start / "verdict.json").read_text())["held_out_psnr"] if start else {}


if __name__ == "__main__":
    sys.exit(main())
