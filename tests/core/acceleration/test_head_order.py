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


def test_others_may_write_into_joined_heads() -> None:
    found = []
    for mode in (nullcontext(), KeepHeadOrder()):
        caption = heads(5, 1).requires_grad_()
        with mode:
            joined = torch.cat((caption, heads(6, 2)), dim=2)
            joined[:, :, 3:7] *= 2
        joined.square().sum().backward()
        found.append((joined, caption.grad))
    torch.testing.assert_close(found[1], found[0])


def other_order() -> Tensor:
    return heads(5, 1).clone(memory_format=torch.contiguous_format)


JOINS = {
    "another axis": lambda: torch.cat((heads(5, 1), heads(5, 2)), dim=1),
    "another order": lambda: torch.cat((other_order(), heads(6, 2)), dim=2),
    "another dtype": lambda: torch.cat((heads(5, 1), heads(6, 2).double()), dim=2),
    "one output": lambda: torch.cat((heads(5, 1), heads(6, 2)), 2, out=torch.empty(BATCH, HEADS, 11, WIDTH)),
    "by name": lambda: torch.cat(tensors=(heads(5, 1), heads(6, 2)), dim=2),
}


@pytest.mark.parametrize("name", JOINS)
def test_other_joins_are_left_to_pytorch(name: str) -> None:
    expected = JOINS[name]()
    with KeepHeadOrder():
        found = JOINS[name]()
    torch.testing.assert_close(found, expected, check_stride=True)


def test_heads_that_cannot_be_joined_are_an_error_as_before() -> None:
    with KeepHeadOrder(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat((heads(5, 1), heads(6, 2)[:1]), dim=2)


def parts(*order: int) -> Tensor:
    """Return (3, BATCH, HEADS, 5, WIDTH), whose parts are together in memory as the order of a token's says."""
    rows = torch.randn(BATCH, 5, 3, HEADS, WIDTH)
    return rows.permute(*order)


SPLITS = {
    "another axis": (parts(2, 0, 3, 1, 4).requires_grad_(), 1),
    "another order": (parts(2, 0, 3, 1, 4).contiguous().requires_grad_(), 0),
    "parts that share memory": (heads(5, 1)[None].expand(3, -1, -1, -1, -1).requires_grad_(), 0),
    "fewer axes": (heads(5, 1).requires_grad_(), 0),
    "no gradient": (parts(2, 0, 3, 1, 4), 0),
}


@pytest.mark.parametrize("name", SPLITS)
def test_other_splits_are_left_to_pytorch(name: str) -> None:
    x, dim = SPLITS[name]
    with KeepHeadOrder():
        assert "_Split" in parts(2, 0, 3, 1, 4).requires_grad_().unbind()[0].grad_fn.name()
        found = x.unbind(dim)
    torch.testing.assert_close(found, x.unbind(dim), check_stride=True)
    assert "_Split" not in str(found[0].grad_fn)
