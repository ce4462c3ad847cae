"""The denoiser of the tiny base: ComfyUI's SD3-type MMDiT, small, trained with rectified flow on the icons' latents.

x_t = (1 - t) x_0 + t ε, and the model predicts ε - x_0 at timestep 1000 t, as ComfyUI's flow sampling expects.
Training can stop at any step and resumes from its checkpoint with the same random numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tools.tiny_base import text

DEPTH = 5  # ComfyUI derives it from the width: width = 64 · depth


@dataclass(frozen=True)
class Schedule:
    """The length, batch size and learning rate of the training; durations in steps."""

    steps: int
    batch: int = 1024
    learning_rate: float = 1e-3
    warm_up: int = 400
    cool_down: float = 0.3  # share of the steps over which the learning rate falls to zero
    ema_decay: float = 0.9995

    def rate(self, step: int) -> float:
        """Return the learning rate: linear warm-up, a plateau, then decay along 1 - sqrt."""
        start = self.steps * (1 - self.cool_down)
        fall = 1 - math.sqrt(max(0.0, (step - start) / (self.steps - start)))
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * fall

    def shortened(self, done: int, pace: float, left: float) -> Schedule:
        """Return the schedule with at most as many steps as fit into the time that is left.

        done: steps so far. pace: seconds of a step. left: in seconds.
        """
        return replace(self, steps=min(self.steps, done + max(1, int(left / pace))))


def build(channels: int, text_width: int) -> torch.nn.Module:
    """Return ComfyUI's MMDiT with new weights: Xavier, with modulation and output layers at zero."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    model = OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=channels,
        depth=DEPTH,
        adm_in_channels=text_width,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": text_width, "out_features": 64 * DEPTH},
        },
        qk_norm="rms",
        dtype=torch.float32,
        device="cpu",
        operations=torch.nn,
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
        if name.endswith((".ln_q", ".ln_k")):
            torch.nn.init.ones_(module.weight)
        if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
            torch.nn.init.zeros_(module.weight)
    return model


class Pair(torch.nn.Module):
    """The denoiser and the text encoder as one module, to train, compile and average together."""

    def __init__(self, channels: int, config: dict) -> None:
        super().__init__()
        self.denoiser = build(channels, config["hidden_size"])
        self.text = text.build(config)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        context, pooled = text.encode(self.text, tokens)
        return self.denoiser(noisy, t * 1000, context=context, y=pooled)


def flow_loss(model: Callable[..., Tensor], latents: Tensor, tokens: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the predicted velocity.

    latents and noise: (n, c, h, w); t: (n,) in 0..1; tokens: (n, length).
    """
    fraction = t[:, None, None, None]
    predicted = model((1 - fraction) * latents + fraction * noise, t, tokens)
    return torch.nn.functional.mse_loss(predicted.float(), noise - latents)


def training_step(
    model, latents: Tensor, tokens: Tensor, empty: Tensor, batch: int, generator, odds: Tensor | None = None
) -> Tensor:
    """Return the loss of a random batch, with logit-normal times and 10 % empty captions.

    latents: (variants, n, c, h, w); tokens: (wordings, n, length); odds: (n,), of each image, equal by default.
    """
    device = latents.device
    if odds is None:
        pick = torch.randint(latents.shape[1], (batch,), generator=generator, device=device)
    else:
        pick = torch.multinomial(odds, batch, replacement=True, generator=generator)
    variant = torch.randint(latents.shape[0], (batch,), generator=generator, device=device)
    wording = torch.randint(tokens.shape[0], (batch,), generator=generator, device=device)
    captions = tokens[wording, pick]
    dropped = torch.rand(batch, generator=generator, device=device) < 0.1
    captions = torch.where(dropped[:, None], empty, captions)
    clean = latents[variant, pick].float()
    t = torch.sigmoid(torch.randn(batch, generator=generator, device=device))
    noise = torch.randn(clean.shape, generator=generator, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return flow_loss(model, clean, captions, t, noise)


def train(
    latents: Tensor,
    tokens: Tensor,
    empty: Tensor,
    config: dict,
    schedule: Schedule,
    seed: int,
    checkpoint: Path,
    seconds: float = math.inf,
    compiled: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    odds: Tensor | None = None,
    start: Pair | None = None,
    fit: bool = False,
) -> Pair | None:
    """Train for schedule.steps and return the averaged weights.

    After the time limit the training writes its checkpoint and returns None; the next call resumes it.

    Args:
        latents: (variants, n, c, h, w).
        tokens: (wordings, n, length).
        empty: tokens of the empty caption, (length,).
        seconds: the time limit.
        odds: how often each image is drawn, (n,), relative to the others; equally often by default.
        start: the weights to begin with; new ones by default.
        fit: shorten the schedule to the time limit, by the speed of its warm-up, instead of stopping there.
    """
    device = latents.device
    torch.manual_seed(seed)
    model = Pair(latents.shape[2], config).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    average = Pair(latents.shape[2], config).to(device)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    run = torch.compile(model) if compiled else model
    started = halfway = time.monotonic()
    parameters, averages = list(model.parameters()), list(average.parameters())
    step = first
    while step < schedule.steps:
        # A new generator for each step, so that a resumed run draws the same numbers as an uninterrupted one.
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = training_step(run, latents, tokens, empty, schedule.batch, generator, odds)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(schedule.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        if on_step and step % 100 == 0:
            on_step(step, loss.item())
        if fit and step in (schedule.warm_up // 2, schedule.warm_up):
            loss.item()  # waits for the device
            now = time.monotonic()
            if step == schedule.warm_up:  # the first steps were compiled, and say nothing about the others
                pace = (now - halfway) / (step - schedule.warm_up // 2)
                schedule, seconds = schedule.shortened(step + 1, pace, seconds - (now - started)), math.inf
            halfway = now
        if step % 50 == 0 and time.monotonic() - started > seconds:
            _write_checkpoint(checkpoint, step + 1, model, average, optimizer)
            return None
        step += 1
    _write_checkpoint(checkpoint, schedule.steps, model, average, optimizer)
    return average.eval().requires_grad_(False)


def _write_checkpoint(path: Path, step: int, model: Pair, average: Pair, optimizer: torch.optim.Optimizer) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def sample(
    model: Pair,
    tokens: Tensor,
    empty: Tensor,
    shape: tuple[int, ...],
    seed: int,
    steps: int = 20,
    guidance: float = 4.0,
    shift: float = 1.0,
) -> Tensor:
    """Sample latents (n, *shape) for tokens (n, length) with Euler steps and classifier-free guidance."""
    device = tokens.device
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(len(tokens), *shape, generator=generator).to(device)
    times = torch.linspace(1, 0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    prompts = torch.cat([tokens, empty.expand_as(tokens)])
    with torch.no_grad():
        for now, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            t = torch.full((2 * len(x),), now, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                conditional, unconditional = model(torch.cat([x, x]), t, prompts).float().chunk(2)
            x = x + (after - now) * (unconditional + guidance * (conditional - unconditional))
    return x
