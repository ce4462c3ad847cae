"""Streamed weights: equal gradients and outputs, whichever blocks are streamed, and the model as before afterwards."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from aclora_core.acceleration import ActivationCheckpointing, WeightStream, gather_weights, weight_streaming
from aclora_core.lora.injection import injected
from aclora_core.lora.parameters import LoraSpec, make_parameters
from aclora_core.lora.targets import preset_layers

BLOCKS = 7  # more than the ring has buffers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.point(torch.relu(self.conv(x)))
        hidden = self.norm(x.movedim(1, -1)) + self.shift
        return x + torch.tanh(self.linear(hidden)).movedim(-1, 1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, 6, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().requires_grad_(False)


def image() -> Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))


def results(network: nn.Module, stream: WeightStream | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs without gradients, before and after a backward pass, and the gradient."""
    layers = preset_layers(network, "all")
    weights = make_parameters(layers, LoraSpec(2, 2.0), torch.Generator().manual_seed(1), torch.device("cpu"))
    weights.master.normal_(generator=torch.Generator().manual_seed(2))
    memory = ActivationCheckpointing(network)
    memory.required = set(stream.streamed) if stream else set()
    memory.recomputed = set(range(BLOCKS))
    with injected(layers, weights.layers, lambda module: True), attached(stream), memory.attached():
        with torch.no_grad():
            before = network(image())
        network(image()).square().sum().backward()
        with torch.no_grad():
            after = network(image())
    return before, weights.gradient, after


@contextmanager
def attached(stream: WeightStream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with stream.attached():
        yield


def keep_nothing(stream: WeightStream) -> None:
    pass


def keep_some(stream: WeightStream) -> None:
    stream.stream([0, 1, 3, 5])


def keep_all(stream: WeightStream) -> None:
    stream.stream([])


def keep_all_and_stream_more_and_more(stream: WeightStream) -> None:
    keep_all(stream)
    counts = [len(stream.streamed) for _ in range(6) if stream.stream_more()]
    assert counts == [2, 4, 6, 7] and stream.streamed == list(range(BLOCKS))


@pytest.mark.parametrize("change", [keep_nothing, keep_some, keep_all, keep_all_and_stream_more_and_more])
def test_streamed_weights_give_equal_results(network: Network, change: Callable[[WeightStream], None]) -> None:
    expected = results(network)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    stream = WeightStream(network, network, gather_weights(network), torch.device("cpu"))
    with stream.loaded():
        change(stream)
        for found, wanted in zip(results(network, stream), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, value in network.state_dict().items():
        assert torch.equal(value, own[name])
    assert all("forward" not in vars(block) for block in network.blocks)
    for found, wanted in zip(results(network), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_block_that_is_not_fetched_computes_with_other_weights(network: Network) -> None:
    """The tests above could not fail if the ring held every block."""
    stream = WeightStream(network, network, gather_weights(network), torch.device("cpu"))
    with torch.no_grad(), stream.loaded():
        with stream.attached():
            expected = network(image())
        assert not torch.allclose(network(image()), expected)


def test_weights_made_in_inference_mode_can_be_gathered() -> None:
    with torch.inference_mode():
        torch.manual_seed(0)
        network = Network()
        expected = network(image())
        regions = gather_weights(network)
        torch.testing.assert_close(network(image()), expected)
    assert [region.block for region in regions] == list(network.blocks)


def test_choices_are_spread_evenly_and_know_their_memory(network: Network) -> None:
    stream = WeightStream(network, network, gather_weights(network), torch.device("cpu"))
    size = stream.sizes[0]
    with stream.loaded():
        choices = stream.choices()
    assert [len(choice.indices) for choice in choices] == list(range(BLOCKS + 1))
    assert choices[4].indices == [0, 1, 3, 5] and choices[4].copied == 4 * size
    assert choices[4].more == (BLOCKS - 4) * size and choices[BLOCKS].more == 0
    assert choices[0].more == (BLOCKS - 3) * size  # without the ring


def test_types_of_weights_are_kept(network: Network) -> None:
    network.blocks[2].half()
    network.blocks[3].linear.weight.data = network.blocks[3].linear.weight.data.to(torch.float8_e4m3fn)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    gather_weights(network)
    for name, value in network.state_dict().items():
        assert value.dtype == own[name].dtype and torch.equal(value.float(), own[name].float())


def test_what_the_ring_holds_is_not_copied_again(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass ends with the blocks with which the next one begins: those in the ring's three buffers."""
    stream = WeightStream(network, network, gather_weights(network), torch.device("cpu"))
    copied, start = list[int](), WeightStream._start

    def counted(self: WeightStream, position: int) -> None:
        copied.append(position)
        start(self, position)

    monkeypatch.setattr(WeightStream, "_start", counted)
    with stream.loaded():
        results(network, stream)
    forward, backward = [3, 4, 5, 6], [3, 2, 1, 0]
    without_gradients = [0, 1, 2, *forward]
    # Without gradients, then a step, then without gradients again: the step's end is what that begins with.
    assert copied == [*without_gradients, 0, 1, 2, *forward, *backward, *forward]


def test_a_ring_whose_content_is_unknown_is_filled_before_a_graph_is_replayed(network: Network) -> None:
    stream = WeightStream(network, network, gather_weights(network), torch.device("cpu"))
    with stream.loaded():
        assert stream.content == [None, None, None]
        stream.rewind()
        assert stream.content == [0, 1, 2]
        stream.content = [3, 1, 2]
        stream.rewind()
        assert stream.content == [0, 1, 2]
        stream.forget()
        assert stream.content == [None, None, None]


@pytest.mark.parametrize("answer", [0, 2])
def test_memory_that_cannot_be_pinned_leaves_no_error_behind(
    network: Network, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA keeps the error of a call that failed, and PyTorch raises it at whatever kernel comes next."""
    kept: list[str] = []
    zeros = torch.zeros

    def register(address: int, size: int, flags: int) -> int:
        kept.extend(["CUDA error: out of memory"] if answer else [])
        return answer

    def kernel(*size: int, **options: object) -> Tensor:
        if kept:
            raise RuntimeError(kept.pop())
        return zeros(*size)

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", kernel)
    with ExitStack() as undo:
        memory = torch.empty(8, dtype=torch.uint8)
        assert weight_streaming._pinned(undo, memory, torch.device("cuda")) is (answer == 0)
    assert not kept
