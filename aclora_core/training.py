"""The training of an adapter: batches, steps, and restarts that find out which components are signal."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from . import batches, lora, objective
from .adapter_file import Adapter
from .adapter_restart import LayerRestart, Mode, restart_adapter
from .report import RankReport, Restart, Setting
from .restart import Measure, dynamic_threshold, is_restart_epoch
from .spectrum import delta_singular_values, rank_by_energy, rank_by_sum
from .stepping import Stepper

log = logging.getLogger("aclora")
_MOST_SKIPPED = 10  # steps in a row without a finite loss, after which going on is pointless

RestartMode = Literal[Mode, "off"]


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training. Raises ValueError for a value out of its range."""

    steps: int = 150  # optimisation steps
    learning_rate: float = 5e-4  # of AdamW
    batch_size: int = 4  # pictures in a step
    max_rank: int = 16  # generous upper bound; the signal is found inside it
    alpha: float = 8.0  # strength of the branches: scale = alpha / rank, so the learning speed does not follow the rank
    seed: int = 0  # start of the adapter, order of the pictures, noise and timesteps
    layers: lora.Preset = "attention and feed-forward"
    mode: RestartMode = "paper"  # how noise is redrawn; "off" trains a plain LoRA
    measure: Measure = "energy"  # what the threshold is a share of
    restart_every: int = 10  # epochs (E of the paper)
    lowest_threshold: float = 0.0  # the dynamic threshold is kept between these two
    highest_threshold: float = 1.0
    clear_moments: bool = True  # forget the optimizer's moments of redrawn factors
    weight_decay: float = 0.01
    max_norm: float = 1.0  # gradients are scaled down to this norm

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_rank", "restart_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, but is {getattr(self, name)}.")
        for name in ("learning_rate", "alpha", "max_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be above 0, but is {getattr(self, name)}.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be 0 or more, but is {self.weight_decay}.")
        if not 0 <= self.lowest_threshold <= self.highest_threshold <= 1:
            raise ValueError(
                f"The threshold's range must lie in 0 to 1, lowest first, but is {self.lowest_threshold} to "
                f"{self.highest_threshold}."
            )
        if self.mode not in (*get_args(Mode), "off"):
            raise ValueError(f"The restart mode must be {', '.join(get_args(Mode))} or off, but is '{self.mode}'.")
        for name, kinds in (("measure", get_args(Measure)), ("layers", get_args(lora.Preset))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be {' or '.join(kinds)}, but is '{getattr(self, name)}'.")


class Model(Protocol):
    """What training needs from a model and its pictures; nodes/host.py makes one from the host's MODEL."""

    network: nn.Module  # whose layers get branches
    prefix: str  # stands before their names in a LoRA file
    device: torch.device
    latents: Sequence[Tensor]  # each (1, channels, ...), as the network expects it, in float32
    groups: Sequence[Hashable]  # what pictures of one batch have in common
    objective: objective.Objective

    def denoise(self, noisy: Tensor, sigma: Tensor, pictures: Sequence[int]) -> Tensor:
        """x0 for noisy (n, channels, ...) at sigma (n,), each picture with its own caption."""
        ...


@dataclass
class Progress:
    """Where a training stands; what a callback may look at."""

    losses: list[float] = field(default_factory=list)  # of every step, relative to predicting the mean target
    restarts: list[Restart] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Result:
    """What a training gives, also one that was stopped early."""

    adapter: Adapter
    report: RankReport


def train(
    model: Model,
    config: TrainConfig,
    on_step: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains a LoRA with restarts (AC-LoRA) and gives it with its report.

    After every step on_step is called and should_stop is asked; a training that is stopped gives what it has.
    The same seed gives the same adapter on the same device.

    Raises:
        ValueError: a setting does not fit the model or the pictures; nothing has been trained then.
        FloatingPointError: the loss was not finite for ten steps in a row.
    """
    if not model.latents:
        raise ValueError("There are no pictures to learn from.")
    layers = lora.find_layers(model.network, config.layers, model.prefix)
    if not layers:
        raise ValueError("This model has no linear layer that a LoRA could be trained on.")
    started = time.time()
    generator = torch.Generator().manual_seed(config.seed)
    branches = lora.make_branches(layers, config.max_rank, config.alpha, generator, model.device)
    variance = objective.target_variance(model.objective, model.latents, config.seed)
    progress = Progress()
    with lora.attached(layers, branches):
        for _ in _steps(model, config, branches, variance, generator, progress):
            on_step(progress)
            if should_stop():
                break
    adapter = Adapter({name: branch.layer() for name, branch in branches.items()})
    return Result(adapter, _report(model, config, progress, adapter, started))


def _steps(
    model: Model,
    config: TrainConfig,
    branches: Mapping[str, lora.Branch],
    variance: float,
    generator: torch.Generator,
    progress: Progress,
) -> Iterator[None]:
    """The loop itself; it stands still after each step until it is asked for the next."""
    factors = [factor for branch in branches.values() for factor in (branch.lora_down, branch.lora_up)]
    stepper = Stepper(factors, config.learning_rate, config.weight_decay, config.max_norm)
    noises = torch.Generator(model.device).manual_seed(config.seed)  # drawn where it is used: there it is fast
    total_epochs = max(1, config.steps // batches.steps_per_epoch(model.groups, config.batch_size))
    restarted_at = 0
    order = batches.endless_batches(model.groups, config.batch_size, generator)
    for step, (epoch, epoch_ends, pictures) in enumerate(order, start=1):
        progress.losses.append(stepper.step(_drawn(model, pictures, generator)) / variance)
        if stepper.skipped_in_a_row >= _MOST_SKIPPED:
            raise FloatingPointError(
                f"The loss has not been a finite number for {_MOST_SKIPPED} steps, up to step {step}. Lower the "
                "learning rate, or load the model in bf16 or fp32."
            )
        if epoch_ends and config.mode != "off" and is_restart_epoch(epoch, config.restart_every, total_epochs):
            since = [loss for loss in progress.losses[restarted_at:] if math.isfinite(loss)]
            if since:  # else nothing tells how much is signal
                loss = sum(since) / len(since)
                progress.restarts.append(_restart(config, branches, stepper, noises, step, epoch, total_epochs, loss))
                restarted_at = step
        yield
        if step >= config.steps:
            return


def _drawn(model: Model, pictures: Sequence[int], generator: torch.Generator) -> Callable[[], Tensor]:
    """Draws noise and noise levels for one batch now; the call gives the batch's loss."""
    latents = torch.cat([model.latents[number] for number in pictures])
    noise = torch.randn(latents.shape, generator=generator)
    sigma = objective.draw_sigmas(model.objective, len(pictures), generator)

    def loss() -> Tensor:
        clean, level = latents.to(model.device), sigma.to(model.device)
        return objective.denoising_losses(model, level, noise.to(model.device), clean, pictures).mean()

    return loss


def _restart(
    config: TrainConfig,
    branches: Mapping[str, lora.Branch],
    stepper: Stepper,
    generator: torch.Generator,
    step: int,
    epoch: int,
    total_epochs: int,
    loss: float,
) -> Restart:
    """Splits every layer into signal and noise and draws the noise afresh (AC-LoRA Eq. 2, 3, 5, 6)."""
    threshold = dynamic_threshold(loss, epoch, total_epochs, config.lowest_threshold, config.highest_threshold)
    parts = {name: (branch.lora_down, branch.lora_up, branch.scale) for name, branch in branches.items()}
    mode: Mode = config.mode  # type: ignore[assignment]
    results = restart_adapter(parts, threshold, generator, mode, config.measure)
    if config.clear_moments:
        stepper.forget(_redrawn(branches, results))
    ranks = {name: result.rank for name, result in results.items()}
    return Restart(step, epoch, loss, threshold, ranks)


def _redrawn(branches: Mapping[str, lora.Branch], results: Mapping[str, LayerRestart]) -> Iterator[Tensor]:
    for name, result in results.items():
        if result.redrawn_down:
            yield branches[name].lora_down
        if result.redrawn_up:
            yield branches[name].lora_up


def _report(model: Model, config: TrainConfig, progress: Progress, adapter: Adapter, started: float) -> RankReport:
    """The trajectory, and the spectrum of what came out.

    Signal is as many components as reach the last threshold, or 95 % of the energy. Eq. 3 would count one fewer, and
    an adapter that was cut to it would lose that one.
    """
    spectrum = {
        name: delta_singular_values(*layer.factors(), layer.scale).tolist() for name, layer in adapter.layers.items()
    }
    threshold = max(progress.restarts[-1].threshold, 1e-6) if progress.restarts else 0.95
    reaching = rank_by_sum if progress.restarts and config.measure == "sum" else rank_by_energy
    signal = {name: reaching(torch.tensor(values), threshold) for name, values in spectrum.items()}
    per_epoch = batches.steps_per_epoch(model.groups, config.batch_size)
    facts: dict[str, Setting] = {
        "images": len(model.latents),
        "epochs": math.ceil(len(progress.losses) / per_epoch),
        "optimizer": "AdamW",
        "started_at": started,
        "finished_at": time.time(),
    }
    losses = list(progress.losses)
    return RankReport({**asdict(config), **facts}, losses, [], list(progress.restarts), spectrum, signal)
