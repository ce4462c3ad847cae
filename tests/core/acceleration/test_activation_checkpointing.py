"""Activation checkpointing: equal gradients for less memory, and no more blocks recomputed than needed."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from aclora_core.acceleration.activation_checkpointing import ActivationCheckpointing, find_blocks
from aclora_core.config.train_config import TrainConfig
from aclora_core.lora.injection import injected
from aclora_core.lora.parameters import LoraSpec, make_parameters
from aclora_core.lora.targets import preset_layers
from tests.support.toy import FLOW, Toy, toy, train


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.calls = 0

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return x + self.second(torch.relu(self.first(x))) + shift, shift


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, shift = self.enter(x), torch.ones(6)
        for block in self.blocks:
            x, shift = block(x, shift=shift)
        return x


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().requires_grad_(False)


def gradients(network: Network, memory: ActivationCheckpointing) -> Tensor:
    layers = preset_layers(network, "all")
    weights = make_parameters(layers, LoraSpec(2, 2.0), torch.Generator().manual_seed(1), torch.device("cpu"))
    weights.master.normal_(generator=torch.Generator().manual_seed(2))
    with injected(layers, weights.layers, lambda module: True), memory.attached():
        network(torch.randn(5, 4, generator=torch.Generator().manual_seed(3))).square().sum().backward()
    return weights.gradient


@pytest.mark.parametrize("recomputed", [{0}, {0, 1, 2}])
def test_recomputed_blocks_give_equal_gradients(network: Network, recomputed: set[int]) -> None:
    expected = gradients(network, ActivationCheckpointing(network))
    for block in network.blocks:
        block.calls = 0
    memory = ActivationCheckpointing(network)
    memory.recomputed = recomputed
    torch.testing.assert_close(gradients(network, memory), expected, rtol=0, atol=0)
    assert [block.calls for block in network.blocks] == [1 + (index in recomputed) for index in range(3)]
    assert all("forward" not in vars(block) for block in network.blocks)


class Attention(nn.Module):
    """A block with an attention, and a layer whose input is twice as wide as its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.attend(x)[None, None]
        return x + self.out(F.scaled_dot_product_attention(heads, heads, heads)[0, 0]) * shift, shift


class Operations(TorchDispatchMode):
    """Counts the operations that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [args[-1].shape[0]] if function._opname in ("mm", "addmm") else []  # summed over so many products
        self.counted[" ".join(map(str, [function._opname, *inner]))] += 1
        return function(*args, **(kwargs or {}))


def test_blocks_recomputed_selectively_give_equal_gradients_with_less_computing(network: Network) -> None:
    network.blocks = nn.ModuleList(Attention(6) for _ in range(3)).requires_grad_(False)
    memory = ActivationCheckpointing(network)

    def computed() -> tuple[Tensor, Counter[str]]:
        with Operations() as operations:
            return gradients(network, memory), operations.counted

    expected, once = computed()
    (attention,) = [name for name in once if "attention" in name and "backward" not in name]
    memory.recomputed = {0, 1, 2}
    found, twice = computed()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    memory.selective = {1, 2}
    found, selective = computed()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [count[attention] for count in (once, twice, selective)] == [3, 6, 4]
    assert [count["addmm 12"] for count in (once, twice, selective)] == [3, 6, 4]  # of the layer with the wide input
    assert once["addmm 6"] < twice["addmm 6"] == selective["addmm 6"]


class Unwatched(nn.Module):
    """Does what no one may watch, like operations on the weights of GGUF files."""

    def forward(self, x: Tensor) -> Tensor:
        if _get_current_dispatch_mode_stack():
            raise TypeError("an operation that nobody may watch\nand more")
        return x


@pytest.mark.parametrize("works", [True, False])
def test_a_network_that_cannot_be_recomputed_selectively_is_recomputed_whole(
    network: Network, works: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if not works:
        network.enter = nn.Sequential(Unwatched(), network.enter)
        for block in network.blocks:
            block.second = nn.Sequential(Unwatched(), block.second)
    memory, steps = ActivationCheckpointing(network), list[int]()

    def loss() -> Tensor:
        steps.append(1)
        return network(torch.ones(5, 4, requires_grad=True)).square().sum()

    with memory.attached(), caplog.at_level("INFO", "aclora"):
        memory._step_recomputed(loss)
    assert memory.recomputed == {0, 1, 2} and memory.selective == ({2} if works else set())
    assert len(steps) == (1 if works else 2)
    assert ("keep nothing (an operation that nobody may watch)" in caplog.text) == (not works)


def test_memory_that_runs_out_is_no_reason_to_recompute_whole(network: Network) -> None:
    def full() -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        ActivationCheckpointing(network)._step_recomputed(full)


def test_without_gradients_nothing_is_recomputed(network: Network) -> None:
    memory = ActivationCheckpointing(network)
    memory.recompute_all()
    with torch.no_grad(), memory.attached():
        network(torch.zeros(1, 4))
    assert [block.calls for block in network.blocks] == [1, 1, 1]


def test_blocks_are_the_smallest_parts_with_two_layers() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    single = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    outer = nn.ModuleList([nn.ModuleDict({"group": nn.ModuleList([inner, single])})])
    assert find_blocks(nn.ModuleDict({"outer": outer})) == [inner]
    assert find_blocks(nn.Linear(2, 2)) == []


def test_recompute_all_returns_whether_it_changes_anything() -> None:
    memory = ActivationCheckpointing(Network())
    assert memory.recompute_all() and memory.recomputed == {0, 1, 2}
    assert not memory.recompute_all()
    memory.selective = {1}
    assert memory.recompute_all() and not memory.selective


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int, int], bool]], list[int]]]:
    """Let steps run out of memory by their number and the most rows of a batch, and record these rows."""
    from aclora_core.optim.stepper import Stepper

    rows: list[int] = []
    step, full = Stepper.step, [lambda number, most: False]

    def failing(self, batches, *more):
        rows.append(max(len(batch.sigma) for batch in batches))
        if full[0](len(rows), rows[-1]):
            self.weights.gradient.fill_(5)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step(self, batches, *more)

    def choose(when: Callable[[int, int], bool]) -> list[int]:
        rows.clear()
        full[0] = when
        return rows

    monkeypatch.setattr(Stepper, "step", failing)
    yield choose


CONFIG = TrainConfig(steps=6, batch_size=4, max_rank=2, layers="attention", loss_weight="min-SNR", held_out=0.0)


def with_blocks() -> Toy:
    latents = torch.randn(8, 1, 4, 2, 2, generator=torch.Generator().manual_seed(1)).unbind()
    masks = {1: torch.tensor([[[[0.0, 0.2], [0.5, 1.0]]]])}
    model = toy(latents=latents, objective=FLOW, masks=masks, regularisation={3: 0.5})
    model.network = nn.ModuleDict({"attn": model.network["attn"], "blocks": nn.ModuleList([Block(4)])})
    return model


def test_a_step_that_does_not_fit_is_repeated_and_logged(full_at, caplog: pytest.LogCaptureFixture) -> None:
    rows = full_at(lambda number, most: number == 1)
    with caplog.at_level(logging.INFO, logger="aclora"):
        losses = train(with_blocks(), CONFIG).report.losses
    assert "Out of memory: from now on, gradient checkpointing" in caplog.text and rows == [4] * 7
    full_at(lambda number, most: False)
    assert losses == train(with_blocks(), CONFIG).report.losses
    full_at(lambda number, most: number == 1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(with_blocks(), replace(CONFIG, checkpointing="off"))


def test_if_recomputing_is_not_enough_micro_batches_give_an_equal_adapter(full_at) -> None:
    full_at(lambda number, most: False)
    whole = train(with_blocks(), CONFIG)
    rows = full_at(lambda number, most: number > 2 and most > 1)  # from the third step on
    parted = train(with_blocks(), CONFIG)
    # The third step is repeated with recomputed blocks, then in halves; the next one, drawn ahead, is split as well.
    assert rows == [4, 4, 4, 4, 2, 1, 1, 1, 1]
    torch.testing.assert_close(parted.report.losses, whole.report.losses, rtol=1e-5, atol=1e-6)
    for name, layer in whole.adapter.layers.items():
        torch.testing.assert_close(parted.adapter.layers[name].lora_up, layer.lora_up, rtol=1e-4, atol=1e-6)
    assert "images go through the model 1 at a time" in parted.report.facts.notes
    full_at(lambda number, most: number > 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(with_blocks(), CONFIG)


def test_a_step_whose_captions_do_not_fit_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model = train(with_blocks(), CONFIG), with_blocks()
    condition, calls = model.conditioning, list[list[int]]()

    def conditioning(indices):
        calls.append(list(indices))
        if len(calls) == 6:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return condition(indices)

    monkeypatch.setattr(model, "conditioning", conditioning)
    monkeypatch.setattr("aclora_core.training.batches.BatchStream.prefetch", lambda stream: ())  # as with text encoders
    found = train(model, CONFIG)
    assert calls[5] == calls[6] and len(calls[5]) == 4
    assert found.report.losses == whole.report.losses
    assert found.report.facts.notes.startswith("Out of memory: from now on, gradient checkpointing recomputes every")


def test_captions_that_never_fit_are_encoded_for_fewer_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model = train(with_blocks(), CONFIG), with_blocks()
    condition = model.conditioning

    def conditioning(indices):
        if len(indices) > 2 and torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return condition(indices)

    monkeypatch.setattr(model, "conditioning", conditioning)
    monkeypatch.setattr("aclora_core.training.batches.BatchStream.prefetch", lambda stream: ())
    found = train(model, replace(CONFIG, stop_early=False))
    torch.testing.assert_close(found.report.losses, whole.report.losses, rtol=1e-5, atol=1e-6)
    assert "images go through the model 2 at a time" in found.report.facts.notes


@pytest.mark.parametrize("most", [1, 2, 0])
def test_measurements_that_do_not_fit_take_fewer_images_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model = train(with_blocks(), CONFIG), with_blocks()
    denoise = model.denoise

    def full(noisy: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        if len(noisy) > most and not torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return denoise(noisy, sigma, condition)

    monkeypatch.setattr(model, "denoise", full)
    if not most:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            train(model, CONFIG)
        return
    found = train(model, CONFIG)
    assert f"images go through the model {most} at a time" in found.report.facts.notes
    assert len(found.report.fit) == len(whole.report.fit) > 1
    for (step, loss), (other, expected) in zip(found.report.fit, whole.report.fit, strict=True):
        assert step == other and loss == pytest.approx(expected, rel=1e-5)
