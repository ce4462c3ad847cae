"""Layers that share an input: discovered in a forward pass, then fused, with the same outputs and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aclora_core.adapter.adapter import Layer
from aclora_core.lora import shared_inputs as module_under_test
from aclora_core.lora.injection import injected
from aclora_core.lora.parameters import FlatParameters, LoraLayer

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NAMES = "to_q", "to_k", "to_v"


class Attention(nn.Module):
    """The query, key and value projections of an attention layer."""

    def __init__(self, outputs: dict[str, int] | None = None, names: tuple[str, ...] = NAMES) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(6, (outputs or {}).get(name, 5)))
        self.names = names
        self.requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (getattr(self, name) for name in self.names)
        return torch.cat([q(x), k(context).sin(), v(context)], dim=-1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each fused call."""
    counted: list[int] = []
    compute = module_under_test.adapted_linears

    def counting(x: Tensor, layers: list) -> tuple[Tensor, ...]:
        counted.append(len(layers))
        return compute(x, layers)

    monkeypatch.setattr(module_under_test, "adapted_linears", counting)
    return counted


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    return {f"attn.{name}": child for name, child in module.named_children()}


def branches_of(module: nn.Module, ranks: dict[str, int] | None = None) -> dict[str, LoraLayer]:
    """Branches with random factors."""
    start = {}
    for name, layer in layers_of(module).items():
        rank = (ranks or {}).get(name, 2)
        down, up = (torch.randn(shape, generator=seeded(7)) for shape in ((rank, 6), (layer.out_features, rank)))
        start[name] = Layer(down, up, rank / 2)
    return FlatParameters(start, CPU).layers


def always_unpatched(layer: nn.Module) -> bool:
    return True


def run(module: nn.Module, is_unpatched: Callable[[nn.Module], bool], passes: int = 3, **how: Any) -> list[Tensor]:
    """Return the last output, and the gradients of the inputs and of all factors, summed over the passes."""
    branches, used = branches_of(module), how.get("used", slice(None))
    x, context = (torch.randn(2, 4, 6, generator=seeded(seed)).requires_grad_() for seed in (1, 2))
    with injected(layers_of(module), branches, is_unpatched) as fuse:
        for _ in range(passes):
            given = (x, context) if how.get("cross") else (x,)
            output = checkpoint(module, *given, use_reentrant=False) if how.get("recomputed") else module(*given)
            (output[..., used] ** 2).sum().backward()
            fuse()
    factors = [factor.compute.grad for branch in branches.values() for factor in (branch.down, branch.up)]
    return [output, x.grad, *([context.grad] if how.get("cross") else []), *factors]


WAYS = [{}, {"cross": True}, {"recomputed": True}, {"used": slice(0, 5)}, {"used": slice(10, 15)}]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_fused_layers_match_separate_layers(how: dict, calls: list[int]) -> None:
    """Also for recomputed blocks, and if some outputs are not used."""
    ours = run(Attention(), always_unpatched, **how)
    expected = run(Attention(), lambda layer: False, **how)
    for found, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert max(calls) == (2 if how.get("cross") else 3)


def test_groups_are_discovered_in_the_first_pass(calls: list[int]) -> None:
    run(Attention(), always_unpatched, passes=3)
    assert calls == [1, 1, 1, 3, 3]
    calls.clear()
    run(Attention(), always_unpatched, passes=2, cross=True)
    assert calls == [1, 1, 1, 1, 2]


def test_recomputed_blocks_are_fused_the_same_way(calls: list[int]) -> None:
    run(Attention(), always_unpatched, passes=2, recomputed=True)
    assert calls == [1] * 6 + [3, 3]


def test_layers_are_not_fused_before_fuse_is_called(calls: list[int]) -> None:
    module = Attention()
    with injected(layers_of(module), branches_of(module), always_unpatched):
        for _ in range(3):
            module(torch.randn(2, 6))
    assert calls == [1] * 9


def test_unused_cached_outputs_are_dropped_with_the_next_input(calls: list[int]) -> None:
    module, (first, other) = Attention(), torch.randn(2, 3, 6)
    with injected(layers_of(module), branches_of(module), always_unpatched) as fuse:
        module(first)
        fuse()
        module.to_q(first)
        found = module(other)
    assert calls == [1, 1, 1, 3, 3]
    with injected(layers_of(module), branches_of(module), always_unpatched):
        assert torch.equal(found, module(other))


def test_an_input_changed_in_place_is_computed_anew(calls: list[int]) -> None:
    module, x = Attention(), torch.zeros(2, 6)
    branches = branches_of(module)
    with injected(layers_of(module), branches, always_unpatched) as fuse:
        module(x)
        fuse()
        module.to_q(x)
        x += 1
        after = module.to_k(x)
    assert calls[-2:] == [3, 1]
    own = branches["attn.to_k"]
    delta = own.scale * own.lora_up @ own.lora_down
    torch.testing.assert_close(after, x @ (module.to_k.weight + delta).T + module.to_k.bias)


@pytest.mark.parametrize("different", ["size", "rank"])
def test_only_layers_of_one_kind_are_fused(different: str, calls: list[int]) -> None:
    module = Attention({"to_k": 4} if different == "size" else None)
    branches = branches_of(module, {"attn.to_k": 1} if different == "rank" else None)
    with injected(layers_of(module), branches, always_unpatched) as fuse:
        for _ in range(3):
            module(torch.randn(2, 6))
            fuse()
    assert calls == [1, 1, 1, 2, 1, 2, 1]


def test_inference_passes_are_neither_recorded_nor_fused(calls: list[int]) -> None:
    module = Attention()
    with injected(layers_of(module), branches_of(module), always_unpatched) as fuse, torch.inference_mode():
        for _ in range(2):
            module(torch.randn(2, 6))
            fuse()
    assert calls == [1] * 6


def test_outputs_may_be_changed_in_place() -> None:
    module = Attention()
    x = torch.randn(2, 6, requires_grad=True)
    with injected(layers_of(module), branches_of(module), always_unpatched) as fuse:
        for _ in range(2):
            q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
            fuse()
        before = k.clone()
        q += 1
        v *= 2
        assert torch.equal(k, before)
        (q.sum() + k.sum() + v.sum()).backward()
    assert x.grad is not None
