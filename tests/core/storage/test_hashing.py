"""Content hashes: equal content hashes alike, and any change of it is noticed."""

from __future__ import annotations

import math

import pytest
import torch

from aclora_core.storage.hashing import CHUNK, COLUMNS, UnhashableError, content_hash, weights_hash


def test_types_shapes_and_order_count() -> None:
    values = [
        1,
        1.0,
        True,
        "1",
        None,
        b"1",
        [1],
        (1,),
        {1},
        {"1": 1},
        [[1], 2],
        [1, [2]],
        [1, 2],
        [2, 1],
        "",
        [],
        {},
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.tensor(0.0),
        torch.tensor(-0.0),
        math.nan,
        torch.float32,
        torch.float16,
        ["a", "bc"],
        ["ab", "c"],
    ]
    assert len({content_hash(value) for value in values}) == len(values)
    assert content_hash({"a": 1, "b": {2, 3}}) == content_hash({"b": {3, 2}, "a": 1})
    assert content_hash(torch.eye(3).t()[1:]) == content_hash(torch.eye(3)[1:].contiguous())
    with pytest.raises(UnhashableError, match="function"):
        content_hash([{"a": lambda: None}])


def weights(**changes: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.dtype | None]]:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(300, 200, generator=generator)
    known = {"large": large.half().float(), "small": torch.randn(4096, generator=generator), **changes}
    return [(name, tensor, torch.float32) for name, tensor in known.items()]


def test_equal_weights_hash_alike_and_any_change_is_noticed() -> None:
    first = weights_hash(weights())
    plain = dict((name, tensor) for name, tensor, _ in weights())
    assert weights_hash(reversed(weights())) == first
    one = plain["small"].clone()
    one[1234] += 1e-6
    changed = [
        weights(large=plain["large"] + 1e-4 * torch.ones(300, 1) @ torch.ones(1, 200)),  # as a LoRA of rank 1 does
        weights(large=plain["large"].flip(0)),
        weights(large=plain["large"].reshape(200, 300)),
        weights(small=one),
        weights(another=torch.zeros(1)),
        [(name, tensor, torch.float16) for name, tensor, _ in weights()],
        [(name + "x", tensor, dtype) for name, tensor, dtype in weights()],
    ]
    assert len({first, *map(weights_hash, changed)}) == 1 + len(changed)


def test_widened_weights_hash_like_the_original_ones() -> None:
    plain = dict((name, tensor) for name, tensor, _ in weights())
    assert weights_hash(weights(large=plain["large"].half())) == weights_hash(weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("count", [1, 7, 8 * COLUMNS - 1, 8 * COLUMNS, CHUNK, 2 * CHUNK + 8 * COLUMNS + 3])
def test_a_change_of_any_single_element_is_noticed(dtype: torch.dtype, count: int) -> None:
    zeros = torch.zeros(count)
    first = hash_of(zeros.to(dtype))
    for index in {0, count // 2, count - 1}:
        other = zeros.clone()
        other[index] = 1
        assert hash_of(other.to(dtype)) != first, index


def hash_of(tensor: torch.Tensor) -> str:
    return weights_hash([("weight", tensor, None)])


def test_swapped_elements_are_noticed() -> None:
    plain = torch.randn(CHUNK + 5 * COLUMNS, generator=torch.Generator().manual_seed(0))
    found = {hash_of(plain)}
    for one, other in (
        (0, 1),
        (0, 2),
        (0, 2 * COLUMNS),
        (3, 2 * COLUMNS + 8),
        (5, CHUNK),
        (CHUNK - 1, CHUNK + 5 * COLUMNS - 1),
    ):
        swapped = plain.clone()
        swapped[[one, other]] = plain[[other, one]]
        found.add(hash_of(swapped))
    assert len(found) == 7


def test_the_memory_layout_does_not_count() -> None:
    plain = torch.randn(4, 64, 17, 19, generator=torch.Generator().manual_seed(0)).half()
    for before in range(1, 5):  # a file's weights begin anywhere in it
        longer = torch.cat([torch.zeros(before, dtype=torch.half), plain.reshape(-1)])
        assert hash_of(longer[before:].view(plain.shape)) == hash_of(plain)
    assert hash_of(plain.contiguous(memory_format=torch.channels_last)) == hash_of(plain)
    with torch.inference_mode():
        assert hash_of(plain.clone()) == hash_of(torch.nn.Parameter(plain, requires_grad=False)) == hash_of(plain)


def test_a_weight_without_values_cannot_be_hashed() -> None:
    with pytest.raises(UnhashableError, match="meta"):
        weights_hash([("a", torch.zeros(3, device="meta"), None)])


def test_hashing_weights_changes_and_moves_nothing() -> None:
    before = weights()
    facts = [(tensor.data_ptr(), tensor._version, tensor.clone()) for _, tensor, _ in before]
    weights_hash(before)
    for (_, tensor, _), (place, version, values) in zip(before, facts, strict=True):
        assert (tensor.data_ptr(), tensor._version) == (place, version) and torch.equal(tensor, values)
