"""Which settings draw better? Each lever by itself, and some together, at several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.eight_styles.jobs import Job
from bench.eight_styles.plan import (
    EVERY,
    FAR,
    LEVER_STEPS,
    LEVERS,
    LIBRARY,
    PLAIN,
    RESTARTS,
    THRESHOLDS,
    anchors,
    every_style,
)

MANY_STEPS = (80, 160, 240, 320, 400, 480, 560, 640, 800, 960, 1280, 1600)
_FAR = {**RESTARTS, **FAR}


def jobs(styles: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Return the jobs, seed by seed, the most informative ones first."""
    found = anchors(styles)
    for seed in seeds:
        for name, settings, rest in [*lines(), *more_lines()]:
            marks = MANY_STEPS if rest.get("watched") else LEVER_STEPS
            settings = {**settings, "steps": marks[-1]}
            found += every_style(styles, [seed], "training", name, settings, marks=marks, **rest)
        found += every_style(styles, [seed], "library", "T-LoRA", LIBRARY, marks=(320, 640))
    return found


def lines() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (name, settings, other arguments of Job) of every line."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("plain", PLAIN, {"strengths": (0.8, 1.2, 1.4)}),
        ("plain, watched", PLAIN, {"watched": True}),
        ("restarts every 320, dynamic", _FAR, {"strengths": (0.8, 1.2, 1.4)}),
        ("restarts every 320, dynamic, watched", _FAR, {"watched": True}),
        ("plain, 8 images, watched", PLAIN, {"watched": True, "images": 8}),
        ("plain, 40 images, watched", PLAIN, {"watched": True, "images": 40}),
        ("plain, mirrored", PLAIN, {"mirrored": True}),
        ("plain, mirrored, EMA 0.99", {**PLAIN, "ema_decay": 0.99}, {"mirrored": True}),
    ]
    found += [(f"plain, {name}", {**PLAIN, **lever}, {}) for name, lever in LEVERS.items()]
    far = [("every 320", kind) for kind in ("noise floor", "fixed 0.95", "0.7 to 0.99")]
    near = [
        ("every 160", "dynamic"),
        ("every 160", "noise floor"),
        ("every 40", "dynamic"),
        ("every 40", "noise floor"),
    ]
    for distance, kind in far + near:
        found.append((f"restarts {distance}, {kind}", {**RESTARTS, **EVERY[distance], **THRESHOLDS[kind]}, {}))
    found += [
        ("restarts every 320, dynamic, mirrored", _FAR, {"mirrored": True}),
        ("restarts every 320, dynamic, EMA 0.99", {**_FAR, "ema_decay": 0.99}, {}),
        ("restarts every 320, dynamic, product", {**_FAR, "mode": "product"}, {}),
        ("restarts every 320, dynamic, rank 32", {**_FAR, "max_rank": 32}, {}),
        ("restarts every 320, dynamic, moments kept", {**_FAR, "clear_moments": False}, {}),
        ("rank 4", {**PLAIN, "max_rank": 4}, {}),
        ("rank 64", {**PLAIN, "max_rank": 64}, {}),
    ]
    return found


def more_lines() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return lines that were added after the first ones had been seen."""
    cuts = ("noise_floor", "energy 0.7", "energy 0.8", "energy 0.9", "energy 0.95", "fixed 4")
    uniform = {**PLAIN, "timesteps": "uniform"}
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("plain, prior 0.1", {**PLAIN, "prior_weight": 0.1}, {"strengths": (1.2,)}),
        ("plain, prior 0.03", {**PLAIN, "prior_weight": 0.03}, {}),
        ("plain, caption dropout 0.25", {**PLAIN, "caption_dropout": 0.25}, {}),
        ("plain, cut", PLAIN, {"truncations": cuts}),
        ("restarts every 320, dynamic, cut", _FAR, {"truncations": cuts}),
        ("plain, learning rate 3e-4", {**PLAIN, "learning_rate": 3e-4}, {}),
    ]
    for shift in (1.5, 2.0, 3.0, 5.0):
        found.append((f"uniform, shift {shift:g}", {**uniform, "timestep_shift": shift}, {}))
    for shift in (2.0, 4.0):
        found.append((f"logit-normal, shift {shift:g}", {**PLAIN, "timestep_shift": shift}, {}))
    with_shift: dict[str, dict[str, Any]] = {
        "weight decay 0.3": {"weight_decay": 0.3},
        "weight decay 1": {"weight_decay": 1.0},
        "learning rate 3e-4": {"learning_rate": 3e-4},
        "batch size 8": {"batch_size": 8},
        "stratified": {"stratified_timesteps": True},
        "cosine": {"schedule": "cosine"},
        "attention and feed-forward": {"layers": "attention and feed-forward"},
        "rank 4": {"max_rank": 4},
        "rank 64": {"max_rank": 64},
        "restarts every 160, dynamic": {"mode": "paper", "restart_every": 40, "threshold": "dynamic"},
        "restarts every 320, dynamic": {"mode": "paper", "restart_every": 80, "threshold": "dynamic"},
        "caption dropout 0.1": {"caption_dropout": 0.1},
        "prior 0.02": {"prior_weight": 0.02},
        "gradient clipping 0.3": {"max_norm": 0.3},
    }
    found += [(f"uniform, {name}", {**uniform, **lever}, {}) for name, lever in with_shift.items()]
    found += [("uniform, mirrored", uniform, {"mirrored": True})]
    return found
