"""Small models with a known best adapter, for tests of the training."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aclora_core import Result, TrainConfig
from aclora_core import training as core_training
from aclora_core.acceleration.fused_modules import FusableModules
from aclora_core.diffusion.objective import Objective

WIDTH = 16
# The settings of trainings with held-out images and restarts; others name what they change.
HELD_OUT = TrainConfig(held_out=0.2, mode="paper", threshold="noise floor", restart_every=10)
# The model gets the clean image and must reproduce it, so the true update is known.
CLEAN = Objective(
    add_noise=lambda sigma, noise, latent: latent,
    denoised=lambda sigma, output, noisy: output,
    sigma_at=lambda share: share,
    sampling="uniform",
)
FLOW = Objective(
    add_noise=lambda sigma, noise, latent: latent + sigma.view(-1, 1, 1, 1) * (noise - latent),
    denoised=lambda sigma, output, noisy: noisy - sigma.view(-1, 1, 1, 1) * output,
    sigma_at=lambda share: share,
    sampling="logit-normal",
)


@dataclass
class Toy:
    """A linear model, and its own training set. Its right weight is the identity; it is off by `error`."""

    error: Tensor
    latents: Sequence[Tensor]
    objective: Objective = CLEAN
    batch_keys: Sequence[Hashable] = ()
    variants: dict[int, list[int]] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    regularisation: dict[int, float] = field(default_factory=dict)
    without_caption: dict[int, int] = field(default_factory=dict)
    prompts: Sequence[int] = ()
    prefix: str = "toy."
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    spoil: Callable[[int], bool] = lambda call: False  # whether a call returns NaN; call 0 is the trial run
    spoil_step: Callable[[int], bool] = lambda call: False  # the same, counting only calls with a gradient
    fusable: FusableModules = FusableModules()
    weight_stream: None = None
    text_encoders: dict[str, nn.Module] = field(default_factory=dict)
    calls: list[tuple[int, ...]] = field(default_factory=list)
    learned: list[tuple[int, ...]] = field(default_factory=list)  # those of the calls that have a gradient
    measured: list[tuple[int, ...]] = field(default_factory=list)  # the other calls
    network: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        layer = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        layer.weight.copy_(torch.eye(WIDTH) - self.error)
        self.network = nn.ModuleDict({"attn": layer})
        self.batch_keys = self.batch_keys or ["alike"] * len(self.latents)

    def conditioning(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"pictures": torch.tensor(indices)}

    def is_unpatched(self, layer: nn.Module) -> bool:
        return True

    def free_memory(self, wanted: int) -> int | None:
        return None

    def denoise(self, noisy: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.calls.append(tuple(condition["pictures"].tolist()))  # the first is the trial run
        spoil = self.spoil(len(self.calls) - 1)
        with_gradient = torch.is_grad_enabled()
        (self.learned if with_gradient else self.measured).append(self.calls[-1])
        if with_gradient:
            spoil = spoil or self.spoil_step(len(self.learned) - 1)
        output = self.network["attn"](noisy.flatten(1)).view(noisy.shape)
        output = output * math.nan if spoil else output
        return self.objective.denoised(sigma, output, noisy)


def planted(rank: int = 2, size: float = 2.0) -> Tensor:
    """Return a matrix with `rank` singular values, starting at `size` and falling by a factor of 0.8."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator))[0] for _ in range(2))
    return (u * (size * 0.8 ** torch.arange(rank))) @ v.T


def toy(count: int = 48, **changes) -> Toy:
    """Return the model with `count` random images; its error has rank 2."""
    latents = torch.randn(count, 1, WIDTH, 1, 1, generator=torch.Generator().manual_seed(1)).unbind()
    return Toy(**{"error": planted(), "latents": latents, **changes})


def train(model: Toy, config: TrainConfig, *more, **named) -> Result:
    """train with the toy as the model and as its own training set."""
    return core_training.train(model, model, config, *more, **named)
