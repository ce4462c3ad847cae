"""What the study measures: its lines and the steps at which they draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.eight_styles.jobs import Job
from bench.eight_styles.libraries import METHODS
from bench.eight_styles.verdict import DEFAULT

STEPS = (160, 320, 640, 1280, 2400)  # of the grid
RANKS = (2, 4, 8, 16, 32, 64)
SEEDS = (0, 1, 2)
LEVER_STEPS = (320, 480, 640, 800)

# A LoRA as other trainers make it. Noise levels are drawn as for SD3 (Esser et al. 2024, arXiv 2403.03206).
PLAIN: dict[str, Any] = {
    "mode": "off",
    "held_out": 0.0,
    "smallest": False,
    "stop_early": False,
    "max_rank": 16,
    "timesteps": "logit-normal",
}
RESTARTS: dict[str, Any] = {**PLAIN, "mode": "paper"}
EVERY = {f"every {4 * epochs}": {"restart_every": epochs} for epochs in (10, 20, 40, 80)}  # 16 images are 4 steps
THRESHOLDS: dict[str, dict[str, Any]] = {
    "dynamic": {"threshold": "dynamic"},
    "noise floor": {"threshold": "noise floor"},
    "fixed 0.95": {"threshold": "fixed", "fixed_threshold": 0.95},
    "0.7 to 0.99": {"threshold": "scheduled", "lowest_threshold": 0.7, "highest_threshold": 0.99},
}
FAR: dict[str, Any] = {"mode": "paper", **EVERY["every 320"], **THRESHOLDS["dynamic"]}
NOISY: dict[str, Any] = {**PLAIN, "timesteps": "uniform", "timestep_shift": 2.0}  # more noise than by default
ACLORA: dict[str, dict[str, Any]] = {
    "AC-LoRA, more noise, rank 32": {**NOISY, **FAR, "max_rank": 32},
    "AC-LoRA, more noise, rank 32, dropout": {**NOISY, **FAR, "max_rank": 32, "caption_dropout": 0.1},
    "more noise, rank 32, dropout": {**NOISY, "max_rank": 32, "caption_dropout": 0.1},
    "AC-LoRA every 320, dynamic": {**RESTARTS, **FAR},
    "AC-LoRA every 40, dynamic": {**RESTARTS, **EVERY["every 40"], **THRESHOLDS["dynamic"]},
}
DEFAULT_0_3: dict[str, Any] = {
    "layers": "attention and feed-forward",
    "mode": "paper",
    "threshold": "noise floor",
    "restart_every": 10,
    "held_out": 0.2,
    "stop_early": True,
    "refit": True,
    "smallest": True,
    "max_rank": 16,
    "steps": 600,
    "timesteps": "logit-normal",
}
WATCHED_STEPS = (240, 320, 400, 480, 560, 640, 720, 800, 960, 1280)
CUTS = ("energy 0.9", "energy 0.95", "energy 0.98", "energy 0.99")
LIBRARY: dict[str, Any] = {"rank": 16, "alpha": 8.0, "learning_rate": 5e-4, "batch_size": 4, "steps": 640}

# Each changes one thing of a plain LoRA of rank 16, or of restarts every 320 steps with the dynamic threshold.
LEVERS: dict[str, dict[str, Any]] = {
    "EMA 0.99": {"ema_decay": 0.99},
    "prior 0.5": {"prior_weight": 0.5},
    "stratified timesteps": {"stratified_timesteps": True},
    "cosine": {"schedule": "cosine"},
    "uniform timesteps": {"timesteps": "uniform"},
    "logit-normal timesteps": {"timesteps": "logit-normal"},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 2e-4": {"learning_rate": 2e-4},
    "attention and feed-forward": {"layers": "attention and feed-forward"},
    "attention": {"layers": "attention"},
    "min-SNR": {"loss_weight": "min-SNR"},
    "caption dropout 0.1": {"caption_dropout": 0.1},
    "EMA 0.998": {"ema_decay": 0.998},
    "prior 2": {"prior_weight": 2.0},
    "weight decay 0.3": {"weight_decay": 0.3},
    "batch size 8": {"batch_size": 8},
    "debiased": {"loss_weight": "debiased"},
}
# Each changes one thing of the default's settings, after 640 steps.
NOISY_LEVERS: dict[str, dict[str, Any]] = {
    "strengths": {},
    "alpha 16": {"alpha": 16.0},
    "learning rate 7e-4": {"learning_rate": 7e-4},
    "EMA 0.99": {"ema_decay": 0.99},
    "gradient clipping 0.3": {"max_norm": 0.3},
    "product every 320": {**FAR, "mode": "product"},
    "learning rate 1e-3, alpha 4": {"learning_rate": 1e-3, "alpha": 4.0},
    "no weight decay": {"weight_decay": 0.0},
    "rank 64": {"max_rank": 64},
    "batch size 8": {"batch_size": 8},
}


def every_style(
    styles: Sequence[str], seeds: Iterable[int], kind: Any, name: str, settings: dict[str, Any], **rest: Any
) -> list[Job]:
    """Return the jobs of one line: each seed of each style."""
    return [Job(kind, name, style, seed, settings, **rest) for seed in seeds for style in styles]


def anchors(styles: Sequence[str]) -> list[Job]:
    """Return the jobs that need no training: the base, the real images, and these through the autoencoder."""
    return [
        Job(kind, name, style)
        for kind, name in (("base", "the base"), ("real", "real images"), ("vae", "real images, autoencoder"))
        for style in styles
    ]  # type: ignore[arg-type]


def grid(styles: Sequence[str], seed: int, steps: Sequence[int] = STEPS, ranks: Sequence[int] = RANKS) -> list[Job]:
    """Return the plain LoRAs; the large ranks come first, as they take longest."""
    jobs = []
    for rank in sorted(ranks)[::-1]:
        settings = {**PLAIN, "max_rank": rank, "steps": steps[-1]}
        jobs += every_style(styles, [seed], "training", f"rank {rank}", settings, marks=tuple(steps))
    return jobs


def jobs(styles: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Return the jobs of the table: what matters most first, since a time limit may cut the rest.

    The steps beyond 1280 of the grid are drawn with the first seed only: they are far behind.
    """
    found = anchors(styles) + every_style(styles, seeds, "training", DEFAULT.name, {})
    for seed in seeds:
        found += watched(styles, seed, "more noise, rank 32", WATCHED_STEPS, truncations=CUTS)
    for seed in seeds:
        found += grid(styles, seed, STEPS[:-1])
        for name, settings in ACLORA.items():
            settings = {**settings, "steps": 800}
            found += every_style(styles, [seed], "training", name, settings, marks=(480, 640, 800))
    for method in METHODS:
        found += every_style(styles, seeds[:1], "library", method, LIBRARY, marks=(640,))
    for images in (8, 40):
        name = f"more noise, rank 32, {images} images"
        found += watched(styles, seeds[0], name, (*WATCHED_STEPS, 1600), images=images)
    found += grid(styles, seeds[0], STEPS[-1:])
    found += every_style(styles, seeds[:2], "training", "0.3.0's default", DEFAULT_0_3)
    return found + around_the_default(styles, seeds[0])


def around_the_default(styles: Sequence[str], seed: int) -> list[Job]:
    """Return jobs that change one thing of the default's settings, which stops by itself in none of them."""
    found = []
    for images in (24, 32, 48):
        settings = {**NOISY, "max_rank": 32, "steps": 800}
        name = f"more noise, rank 32, {images} images"
        found += every_style(styles, [seed], "training", name, settings, marks=(640, 800), images=images)
    for name, lever in NOISY_LEVERS.items():
        settings = {**NOISY, "max_rank": 32, "steps": 640, **lever}
        rest = {"strengths": (0.9, 1.1, 1.2)} if not lever else {}
        name = f"more noise, rank 32, {name}"
        found += every_style(styles, [seed], "training", name, settings, marks=(480, 640), **rest)
    return found


def watched(styles: Sequence[str], seed: int, name: str, steps: Sequence[int], **rest: Any) -> list[Job]:
    """Return the jobs of a line in which the candidates for the stop are measured too."""
    settings = {**NOISY, "max_rank": 32, "steps": steps[-1]}
    return every_style(styles, [seed], "training", name, settings, marks=tuple(steps), watched=True, **rest)
