"""bench.eight_styles.libraries: each method learns, leaves the network as it was, and does what it is known for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aclora_core.config import TrainConfig
from aclora_core.diffusion import SimpleModel, SimpleTrainingSet
from aclora_core.lora.targets import preset_layers
from aclora_core.training import train
from aclora_core.training.fixed_noise import FixedNoiseImages
from bench.eight_styles import t_lora
from bench.eight_styles.libraries import METHODS, LibraryResult, train_library
from bench.training_session import training_session
from tests.support.toy import FLOW

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # the libraries warn
]

RANK, STEPS, IMAGES = 4, 40, 6
PACKAGES = {"LoHa": "lycoris", "LoKr": "lycoris", "T-LoRA": "torch"}  # the others need peft


def needing_its_library(method: str) -> Any:
    package = PACKAGES.get(method, "peft")
    missing = importlib.util.find_spec(package) is None
    reason = f"{package} is missing: pip install --no-deps -r bench/requirements.txt"
    return pytest.param(method, marks=pytest.mark.skipif(missing, reason=reason))


def each_of(*methods: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", [needing_its_library(method) for method in methods])


class Network(nn.Module):
    """A convolution, a linear layer of the condition and two of tokens; two names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 12, 3, padding=1)
        self.attn = nn.ModuleDict({"proj": nn.Linear(12, 16), "out": nn.Linear(16, 2, bias=False)})
        self.proj = nn.Linear(3, 12)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.embed(x) + self.proj(condition)[:, :, None, None]
        tokens = torch.tanh(self.attn["proj"](hidden.flatten(2).transpose(1, 2)))
        return self.attn["out"](tokens).transpose(1, 2).view(x.shape)


def model(dtype: torch.dtype = torch.float32) -> SimpleModel:
    torch.manual_seed(0)
    network = Network().to(dtype).requires_grad_(False).eval()

    def predict(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return network(noisy.to(dtype), condition.to(dtype)).to(noisy.dtype)

    return SimpleModel(network, FLOW, predict, dtype=dtype)


def training_set() -> SimpleTrainingSet:
    generator = torch.Generator().manual_seed(1)
    latents = 2 + 0.5 * torch.randn(IMAGES, 1, 2, 4, 4, generator=generator)
    return SimpleTrainingSet(latents.unbind(), torch.randn(IMAGES, 1, 3, generator=generator).unbind())


def layers_of(network: Any) -> dict[str, nn.Module]:
    return preset_layers(network.network, "all", network.prefix)


def validation(network: Any, images: Any, indices: Sequence[int] = range(IMAGES)) -> Callable[[], float]:
    """Return the loss on fixed noise, as a function to call whenever it is wanted."""
    held = FixedNoiseImages(network, images, indices, 7, IMAGES)
    return lambda: float(held.losses().mean())


@dataclass(frozen=True)
class Trained:
    result: LibraryResult
    losses: Mapping[int, float]  # after each mark
    base: float


def trained(method: str, network: SimpleModel, marks: Sequence[int] = (STEPS,), **changes: Any) -> Trained:
    images = training_set()
    loss, losses = validation(network, images), {}
    base = loss()
    settings: dict[str, Any] = {
        "steps": STEPS,
        "rank": RANK,
        "alpha": 8.0,
        "learning_rate": 1e-2,
        "batch_size": 2,
        "seed": 3,
        "marks": marks,
        "on_mark": lambda step: losses.update({step: loss()}),
    }
    layers = changes.pop("layers", layers_of(network))
    result = train_library(method, network, images, layers, range(IMAGES), **settings | changes)
    return Trained(result, losses, base)


# --- all methods ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_of(*METHODS)
def test_each_method_lowers_the_loss(method: str, dtype: torch.dtype) -> None:
    found = trained(method, model(dtype), marks=(1, STEPS))
    assert found.losses[STEPS] < min(found.losses[1], found.base) * 0.95
    assert found.result.parameters > 0 and found.result.seconds > 0
    assert found.result.bytes > 2 * found.result.parameters * (0.5 if method == "AdaLoRA" else 1)


@each_of(*METHODS)
def test_the_same_seed_gives_the_same_adapter(method: str) -> None:
    first, again, other = (trained(method, model(), seed=seed).losses for seed in (3, 3, 4))
    assert first == again and first != other


@each_of(*METHODS)
def test_marks_are_called_without_gradients_and_change_nothing(method: str) -> None:
    states = []

    def look(step: int) -> None:
        torch.rand(3)  # whatever a caller draws from the global generator
        states.append((step, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    network = model()
    loss = validation(network, training_set())
    trained(method, network, marks=(2, 5, 9), steps=9, on_mark=look)
    assert states == [(2, False, False), (5, False, False), (9, False, False)]
    often, once = (trained(method, network, marks=marks, steps=9).losses[9] for marks in ((2, 5, 9), (9,)))
    assert often == once != loss()


def state_of(network: SimpleModel) -> dict[str, Any]:
    """Return all that a training must leave as it was."""
    modules = dict(network.network.named_modules())
    return {
        "model": {name: id(value) for name, value in vars(network).items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: {key: id(value) for key, value in vars(it).items()} for name, it in modules.items()},
        "hooks": {
            name: [len(value) for key, value in vars(it).items() if "hooks" in key and value is not None]
            for name, it in modules.items()
        },
        "parameters": {name: (id(it), it.requires_grad, it.grad) for name, it in network.network.named_parameters()},
    }


@pytest.mark.parametrize("failing", [False, True])
@each_of(*METHODS)
def test_the_network_is_left_as_it_was(method: str, failing: bool) -> None:
    network = model()
    network.network.attn["proj"].bias.requires_grad_()  # what was trainable stays so
    before, weights = state_of(network), {name: it.clone() for name, it in network.network.state_dict().items()}

    def fail(step: int) -> None:
        raise RuntimeError("the drawing failed")

    if failing:
        with pytest.raises(RuntimeError, match="the drawing failed"):
            trained(method, network, marks=(2,), steps=4, on_mark=fail)
    else:
        trained(method, network, steps=4, marks=(4,))
    assert state_of(network) == before
    after = network.network.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[name], it) for name, it in weights.items())


def test_a_layer_whose_name_ends_like_another_is_not_adapted() -> None:
    pytest.importorskip("peft", reason="peft is missing: pip install --no-deps -r bench/requirements.txt")
    network = model()
    layers = {"diffusion_model.proj": network.network.proj}  # beside attn.proj
    assert trained("rsLoRA", network, layers=layers, rank=3, steps=1, marks=()).result.parameters == 3 * (3 + 12)


# --- peft's plain LoRA and ours ---


@each_of("peft LoRA")
def test_pefts_plain_lora_learns_step_by_step_what_ours_does(method: str) -> None:
    network, images, ours = model(), training_set(), {}
    loss = validation(network, images)
    config = TrainConfig(
        steps=STEPS,
        learning_rate=1e-2,
        batch_size=2,
        max_rank=RANK,
        alpha=8.0,
        seed=3,
        layers="all",
        mode="off",
        held_out=0.0,
    )
    train(network, images, config, on_step=lambda progress: ours.update({progress.done: loss()}))
    found = trained(method, network, marks=range(1, STEPS + 1))
    assert list(found.losses) == list(ours) == list(range(1, STEPS + 1))
    torch.testing.assert_close(list(found.losses.values()), list(ours.values()), rtol=1e-3, atol=0)
    assert ours[STEPS] < 0.8 * found.base


# --- what each method is known for ---


@each_of("AdaLoRA")
def test_adalora_ends_with_its_budget_of_ranks(method: str) -> None:
    network, budgets = model(), {}

    def count(step: int) -> None:
        values = [it for name, it in network.network.named_parameters() if ".lora_E." in name]
        budgets[step] = sum(int(value.count_nonzero()) for value in values)

    trained(method, network, marks=(1, 10, 15, STEPS), on_mark=count)
    layers = 3  # without the convolution
    assert budgets[1] == 6 * layers and budgets[STEPS] == RANK * layers
    assert budgets[1] > budgets[10] > budgets[15] >= budgets[STEPS]


@each_of("AdaLoRA")
def test_adalora_needs_a_linear_layer(method: str) -> None:
    network = model()
    layers = {"diffusion_model.embed": network.network.embed}
    with pytest.raises(ValueError, match="linear layers only"):
        trained(method, network, layers=layers)
    assert isinstance(network.network.embed, nn.Conv2d)


@each_of("rsLoRA", "DoRA")
def test_the_variants_of_lora_differ_from_it(method: str) -> None:
    """At rank 4 rsLoRA's scale is twice that of LoRA; DoRA trains one more number for each output."""
    plain, variant = (trained(name, model()) for name in ("peft LoRA", method))
    assert variant.losses != plain.losses
    outputs = 12 + 16 + 2 + 12
    assert variant.result.parameters - plain.result.parameters == (outputs if method == "DoRA" else 0)


# --- T-LoRA ---


def test_fewer_ranks_are_used_at_high_noise() -> None:
    mask = t_lora.RankMask(FLOW, 16, torch.device("cpu"))
    assert mask.current.sum() == 16
    mask.use_at(torch.tensor([0.0, 0.25, 0.5, 0.99, 1.0, 1.5]))
    assert mask.current.sum(1).tolist() == [16, 14, 12, 8, 8, 8]
    assert (mask.current.diff(dim=1) <= 0).all()  # the first ranks are used


def test_the_rank_falls_from_the_largest_to_the_smallest() -> None:
    ranks = [t_lora.rank_at(timestep, 7, 3) for timestep in range(t_lora.TIMESTEPS + 1)]
    assert (ranks[0], ranks[250], ranks[251], ranks[-1]) == (7, 6, 5, 3)
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 5), (3, 7, 6)), (nn.Linear(6, 5), (3, 6)), (nn.Conv2d(4, 5, 3, stride=2, padding=1), (3, 4, 8, 8))],
)
def test_a_branch_adds_nothing_at_first_and_its_delta_later(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    branch, x = t_lora.OrthogonalLora(layer, 4), torch.randn(shape)
    everything = torch.ones(1, 4)
    with torch.no_grad():
        assert branch(x, everything).abs().max() < 1e-6
        down = branch.down.flatten(1)
        torch.testing.assert_close(down @ down.T, torch.eye(4))
        for parameter in branch.parameters():
            parameter.add_(torch.randn_like(parameter))
        mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
        added = branch(x, mask)
        assert added.shape == layer(x).shape and added[2].abs().max() == 0
        for row in range(3):  # each image has its own ranks
            torch.testing.assert_close(added[row : row + 1], branch(x[row : row + 1], mask[row : row + 1]))
        torch.testing.assert_close(added[:1], self_applied(layer, branch, x[:1]))


def self_applied(layer: nn.Module, branch: t_lora.OrthogonalLora, x: Tensor) -> Tensor:
    """Return what the layer's output changes by when the branch's delta is added to its weight."""
    up, down = branch.up.flatten(1) * branch.values, branch.down.flatten(1)
    start_up, start_down = branch.start_up.flatten(1) * branch.start_values, branch.start_down.flatten(1)
    delta = (up @ down - start_up @ start_down).view(layer.weight.shape)
    changed = torch.func.functional_call(layer, {"weight": layer.weight + delta}, x)
    return changed - layer(x)


def test_t_lora_draws_with_the_ranks_of_each_noise_level() -> None:
    """The last ranks have no part in what is drawn at the highest noise level."""
    network, images = model(), training_set()
    noisy, condition = torch.randn(2, 2, 4, 4), images.conditioning([0, 1])
    drawn: dict[str, Tensor] = {}

    def draw(name: str) -> None:
        drawn[name] = network.denoise(noisy, torch.tensor([1.0, 0.01]), condition)

    def look(step: int) -> None:
        draw("trained")
        for branch in branches:
            branch.values[RANK // 2 :] += 1
        draw("changed")

    branches: list[t_lora.OrthogonalLora] = []
    make = t_lora.OrthogonalLora.__init__

    def remember(branch: t_lora.OrthogonalLora, *given: Any) -> None:
        make(branch, *given)
        branches.append(branch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t_lora.OrthogonalLora, "__init__", remember)
        trained("T-LoRA", network, marks=(1,), steps=1, on_mark=look)
    changes = (drawn["trained"] - drawn["changed"]).flatten(1).abs().amax(1)
    assert changes[0] == 0 < changes[1]


# --- bad input ---


def test_bad_input_is_refused_before_the_work_starts() -> None:
    network = model()
    with pytest.raises(ValueError, match="one of peft LoRA, .*, T-LoRA, but is 'LoRA'"):
        trained("LoRA", network)
    with pytest.raises(ValueError, match="steps of 1 to 40, but 41 is among them"):
        trained("T-LoRA", network, marks=(1, 41))
    with pytest.raises(ValueError, match="no layers"):
        trained("T-LoRA", network, layers={})


def test_weights_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        trained("T-LoRA", model(), learning_rate=1e30, marks=())


@pytest.mark.parametrize(("method", "module"), [("DoRA", "peft"), ("LoKr", "lycoris.modules")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    method: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps -r bench/requirements.txt"):
        trained(method, model())


# --- the real tiny base ---


@pytest.mark.slow
@each_of(*METHODS)
def test_each_method_learns_on_the_tiny_base(pack: Any, method: str) -> None:
    """Its layers are ComfyUI's own classes, made in inference mode."""
    with torch.inference_mode():
        base, clip, vae = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
        latents = [{"samples": vae.encode(torch.full((1, 128, 128, 3), value))} for value in (0.2, 0.8)]
        captions = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("night", "day")]
        with training_session(pack, base, latents, captions) as session:
            network = session.network
            before, loss = state_of(network), validation(network, session.images, range(2))
            first, layers, losses = loss(), layers_of(network), {}
            weights = {name: it.clone() for name, it in network.network.state_dict().items()}
            train_library(
                method,
                network,
                session.images,
                layers,
                range(2),
                steps=3,
                rank=4,
                alpha=4.0,
                learning_rate=5e-4,
                batch_size=2,
                seed=0,
                marks=(3,),
                on_mark=lambda step: losses.update({step: loss()}),
            )
            assert losses[3] < first == loss()
            assert state_of(network) == before and len(layers) == 55
            after = network.network.state_dict()
            assert list(after) == list(weights) and all(torch.equal(after[name], it) for name, it in weights.items())
