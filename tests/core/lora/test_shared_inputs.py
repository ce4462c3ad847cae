"""Layers that read the same tensor: found while the module runs, computed together, and what they give as before."""

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
    """As the networks' own, as far as it matters here: three layers for what asks, and what is asked."""

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
    """How many layers were computed together, call by call."""
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
    """Branches whose factors are all random."""
    start = {}
    for name, layer in layers_of(module).items():
        rank = (ranks or {}).get(name, 2)
        down, up = (torch.randn(shape, generator=seeded(7)) for shape in ((rank, 6), (layer.out_features, rank)))
        start[name] = Layer(down, up, rank / 2)
    return FlatParameters(start, CPU).layers


def together(layer: nn.Module) -> bool:
    return True


def run(module: nn.Module, plain: Callable[[nn.Module], bool], passes: int = 3, **how: Any) -> list[Tensor]:
    """The last output, the gradients of the inputs and those of all factors, summed over the passes."""
    branches, used = branches_of(module), how.get("used", slice(None))
    x, context = (torch.randn(2, 4, 6, generator=seeded(seed)).requires_grad_() for seed in (1, 2))
    with injected(layers_of(module), branches, plain) as join:
        for _ in range(passes):
            given = (x, context) if how.get("crossed") else (x,)
            output = checkpoint(module, *given, use_reentrant=False) if how.get("twice") else module(*given)
            (output[..., used] ** 2).sum().backward()
            join()
    factors = [factor.compute.grad for branch in branches.values() for factor in (branch.down, branch.up)]
    return [output, x.grad, *([context.grad] if how.get("crossed") else []), *factors]


WAYS = [{}, {"crossed": True}, {"twice": True}, {"used": slice(0, 5)}, {"used": slice(10, 15)}]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_nothing_changes_but_the_way(how: dict, calls: list[int]) -> None:
    """Also where blocks are computed twice, and where what one layer gives is not used."""
    ours = run(Attention(), together, **how)
    expected = run(Attention(), lambda layer: False, **how)
    for found, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert max(calls) == (2 if how.get("crossed") else 3)


def test_they_are_found_in_the_first_pass(calls: list[int]) -> None:
    run(Attention(), together, passes=3)
    assert calls == [1, 1, 1, 3, 3]
    calls.clear()
    run(Attention(), together, passes=2, crossed=True)
    assert calls == [1, 1, 1, 1, 2]


def test_what_is_computed_twice_is_computed_alike(calls: list[int]) -> None:
    run(Attention(), together, passes=2, twice=True)
    assert calls == [1] * 6 + [3, 3]


def test_without_a_word_they_stay_alone(calls: list[int]) -> None:
    module = Attention()
    with injected(layers_of(module), branches_of(module), together):
        for _ in range(3):
            module(torch.randn(2, 6))
    assert calls == [1] * 9


def test_what_nobody_asks_for_goes_with_the_next(calls: list[int]) -> None:
    module, (first, other) = Attention(), torch.randn(2, 3, 6)
    with injected(layers_of(module), branches_of(module), together) as join:
        module(first)
        join()
        module.to_q(first)
        found = module(other)
    assert calls == [1, 1, 1, 3, 3]
    with injected(layers_of(module), branches_of(module), together):
        assert torch.equal(found, module(other))


def test_a_tensor_that_was_changed_in_between_is_another(calls: list[int]) -> None:
    module, x = Attention(), torch.zeros(2, 6)
    branches = branches_of(module)
    with injected(layers_of(module), branches, together) as join:
        module(x)
        join()
        module.to_q(x)
        x += 1
        after = module.to_k(x)
    assert calls[-2:] == [3, 1]
    own = branches["attn.to_k"].layer()
    delta = own.scale * own.lora_up @ own.lora_down
    torch.testing.assert_close(after, x @ (module.to_k.weight + delta).T + module.to_k.bias)


@pytest.mark.parametrize("different", ["size", "rank"])
def test_only_what_is_alike_is_computed_together(different: str, calls: list[int]) -> None:
    module = Attention({"to_k": 4} if different == "size" else None)
    branches = branches_of(module, {"attn.to_k": 1} if different == "rank" else None)
    with injected(layers_of(module), branches, together) as join:
        for _ in range(3):
            module(torch.randn(2, 6))
            join()
    assert calls == [1, 1, 1, 2, 1, 2, 1]


def test_pictures_drawn_meanwhile_do_not_mix_with_it(calls: list[int]) -> None:
    module = Attention()
    with injected(layers_of(module), branches_of(module), together) as join:
        with torch.inference_mode():
            for _ in range(2):
                module(torch.randn(2, 6))
                join()
    assert calls == [1] * 6


def test_what_is_given_may_be_changed_in_place() -> None:
    module = Attention()
    x = torch.randn(2, 6, requires_grad=True)
    with injected(layers_of(module), branches_of(module), together) as join:
        for _ in range(2):
            q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
            join()
        before = k.clone()
        q += 1
        v *= 2
        assert torch.equal(k, before)
        (q.sum() + k.sum() + v.sum()).backward()
    assert x.grad is not None
