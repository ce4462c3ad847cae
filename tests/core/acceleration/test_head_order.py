"""Heads that stay in the order in which they are in memory: the same values and gradients, without copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from aclora_core.acceleration.head_order import KeepHeadOrder

BATCH, HEADS, WIDTH = 2, 3, 4


def heads(tokens: int, seed: int, row: int = HEADS * WIDTH) -> Tensor:
    """Return (batch, heads, tokens, width), parts of rows of a layer's output."""
    rows = torch.randn(BATCH, tokens, row, generator=torch.Generator().manual_seed(seed))
    return rows[..., : HEADS * WIDTH].unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def attended(qkv: Tensor, caption: Tensor) -> Tensor:
    """As in Flux.1: split the heads of an image, join each part with the caption's, and attend."""
    split = qkv.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    q, k, v = (torch.cat((caption, part), dim=2) for part in split)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def one_part(qkv: Tensor, caption: Tensor) -> Tensor:
    """The other parts get no gradient."""
    _, k, _ = qkv.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    return torch.cat((caption, k), dim=2)


@pytest.mark.parametrize("row", [3 * HEADS * WIDTH, 5 * HEADS * WIDTH], ids=["whole rows", "parts of rows"])
@pytest.mark.parametrize("network", [attended, one_part])
def test_values_and_gradients_are_the_same(network: Callable[[Tensor, Tensor], Tensor], row: int) -> None:
    found = []
    for mode in (nullcontext(), KeepHeadOrder()):
        rows = torch.randn(BATCH, 6, row, generator=torch.Generator().manual_seed(0)).requires_grad_()
        caption = heads(5, 1).requires_grad_()
        with mode:
            output = network(rows[..., : 3 * HEADS * WIDTH], caption)
        output.square().sum().backward()
        found.append((output, rows.grad, caption.grad))
    torch.testing.assert_close(found[1], found[0])


def test_heads_are_joined_and_split_where_they_lie() -> None:
    given = []
    rows = torch.randn(BATCH, 6, 3 * HEADS * WIDTH, requires_grad=True)
    rows.register_hook(lambda grad: given.append(grad.is_contiguous()))
    with KeepHeadOrder():
        q, k, v = rows.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        joined = torch.cat((heads(5, 1), q), dim=2)
        assert v.contiguous().data_ptr() == v.data_ptr() == rows.data_ptr() + 2 * HEADS * WIDTH * 4
    assert joined.transpose(1, 2).is_contiguous() and "_Join" in joined.grad_fn.name() and "_Split" in k.grad_fn.name()
    (joined.sum() + k.sum() + v.sum()).backward()
    assert given == [True]


OTHERS = {
    "another axis": lambda: torch.cat((heads(5, 1), heads(5, 2)), dim=1),
    "another order": lambda: torch.cat((heads(5, 1).clone(memory_format=torch.contiguous_format), heads(6, 2)), 2),
    "another dtype": lambda: torch.cat((heads(5, 1), heads(6, 2).double()), dim=2),
    "one output": lambda: torch.cat((heads(5, 1), heads(6, 2)), 2, out=torch.empty(BATCH, HEADS, 11, WIDTH)),
    "fewer axes": lambda: torch.stack(heads(5, 1)[0].unbind(0)),
    "no gradient": lambda: torch.stack(torch.zeros(2, 5, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind()),
    "another part": lambda: torch.stack(heads(5, 1)[None].expand(3, -1, -1, -1, -1).requires_grad_().unbind()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_is_left_to_pytorch(name: str) -> None:
    expected = OTHERS[name]()
    with KeepHeadOrder():
        found = OTHERS[name]()
    torch.testing.assert_close(found, expected, check_stride=True)
    assert not any(word in str(found.grad_fn) for word in ("_Join", "_Split"))
