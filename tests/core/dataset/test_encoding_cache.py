"""Encoded pictures and captions on the drive: exact, bounded, and never in the way."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from aclora_core.dataset import encoding_cache
from aclora_core.dataset.encoding_cache import EncodingCache
from aclora_core.storage.hashing import CHUNK, COLUMNS, UnhashableError, content_hash, weights_hash

CONDITIONING = [
    [
        torch.arange(12.0).reshape(1, 3, 4).to(torch.bfloat16),
        {
            "pooled_output": None,
            "guidance": 3.5,
            "mask": torch.tensor([[True, False]]),
            "ids": torch.tensor([1, 2], dtype=torch.int64),
            "text": "Tusche 墨 \ud800",
            "size": (512, 768),
            "nested": [{"empty": torch.zeros(1, 0), "one": torch.tensor(2.5)}, [], {}, -0.0, 1e-300, 2**70],
        },
    ]
]


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def test_a_conditioning_comes_back_exactly_in_another_run(tmp_path: Path) -> None:
    assert EncodingCache(tmp_path / "new").put("key", CONDITIONING)
    found = EncodingCache(tmp_path / "new").get("key")
    assert same(found, CONDITIONING)
    found[0][0].add_(1)  # memory of its own, that can be changed
    assert same(EncodingCache(tmp_path / "new").get("key"), CONDITIONING)
    assert EncodingCache(tmp_path / "new").get("other") is None
    assert os.listdir(tmp_path / "new") == ["key.safetensors"]


def test_views_and_shared_tensors_are_stored_by_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    value = {"view": base[:, 1::2], "turned": base.t(), "whole": base, "again": base}
    cache = EncodingCache(tmp_path)
    assert cache.put("key", value)
    assert same(cache.get("key"), value)


@pytest.mark.parametrize(
    "value",
    [
        [torch.zeros(2), print],
        {"hooks": object()},
        {1: "a number as key"},
        [{1, 2}],
        [torch.float32],
        [torch.nn.Parameter(torch.zeros(2))],
        torch.zeros(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        [torch.zeros(2, device="meta")],
    ],
)
def test_what_cannot_be_stored_exactly_is_not_stored(tmp_path: Path, value: Any) -> None:
    cache = EncodingCache(tmp_path)
    assert not cache.put("key", value)
    assert cache.get("key") is None and cache.problem == "" and os.listdir(tmp_path) == []
    assert cache.put("key", [1])  # and the next one is


def test_a_file_damaged_anywhere_counts_as_none_and_is_made_anew(tmp_path: Path) -> None:
    EncodingCache(tmp_path).put("key", CONDITIONING)
    path = tmp_path / "key.safetensors"
    whole = path.read_bytes()
    generator = random.Random(0)
    damaged = [b"", whole[:7], whole[:-1], whole[: len(whole) // 2], b"x" * len(whole), whole.replace(b"3.5", b"4.5")]
    for _ in range(200):
        place = generator.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << generator.randrange(8))]) + whole[place + 1 :])
    for blob in damaged:
        path.write_bytes(blob)
        # A changed space or a changed key that nothing reads leaves the value as it was.
        found = EncodingCache(tmp_path).get("key")
        assert found is None or same(found, CONDITIONING)
    path.write_bytes(whole[:-1])
    cache = EncodingCache(tmp_path)
    assert cache.get("key") is None
    assert cache.put("key", CONDITIONING)
    assert same(EncodingCache(tmp_path).get("key"), CONDITIONING)


def test_a_file_of_another_making_is_not_run_nor_believed(tmp_path: Path) -> None:
    safetensors.torch.save_file({"0": torch.zeros(2)}, tmp_path / "bare.safetensors")
    structure = json.dumps({"list": [{"tensor": ["9", "cpu"]}]})
    facts = {"structure": structure, "checksum": ""}
    safetensors.torch.save_file({"0": torch.zeros(2)}, tmp_path / "missing.safetensors", facts)
    cache = EncodingCache(tmp_path)
    assert cache.get("bare") is None and cache.get("missing") is None


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def test_what_was_used_longest_ago_is_removed_first(tmp_path: Path) -> None:
    latent = torch.zeros(1000)
    for age, key in enumerate(("new", "middle", "old")):
        EncodingCache(tmp_path).put(key, latent)
        os.utime(tmp_path / f"{key}.safetensors", (time.time() - 60 * age,) * 2)
    size = (tmp_path / "old.safetensors").stat().st_size
    assert EncodingCache(tmp_path, limit=3 * size).get("old") is not None  # used now
    assert EncodingCache(tmp_path, limit=3 * size).put("next", latent)
    assert files(tmp_path) == {"new", "old", "next"}


def test_a_data_set_over_the_limit_keeps_what_fits(tmp_path: Path) -> None:
    latent = torch.zeros(1000)
    EncodingCache(tmp_path).put("of another run", latent)
    size = (tmp_path / "of another run.safetensors").stat().st_size
    for _ in range(2):  # the second time everything stored is found
        cache = EncodingCache(tmp_path, limit=3 * size + size // 2)
        found = [cache.get(str(number)) is not None for number in range(5)]
        stored = [cache.put(str(number), latent) for number in range(5) if not found[number]]
        assert "more than the" in cache.problem
        assert files(tmp_path) == {"0", "1", "2"}
    assert found == [True, True, True, False, False] and stored == [False, False]


def test_overwriting_counts_once_and_a_value_over_the_limit_harms_nothing(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, limit=20_000)
    assert all(cache.put("same", torch.full((2000,), float(number))) for number in range(10))
    assert not EncodingCache(tmp_path, limit=20_000).put("huge", torch.zeros(20_000))
    assert float(EncodingCache(tmp_path).get("same")[0]) == 9


def test_a_full_disk_is_one_sentence_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EncodingCache(tmp_path)
    cache.put("before", [1])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not cache.put("key", CONDITIONING)
    assert "No space left on device" in cache.problem and "turn cache off" in cache.problem
    assert str(tmp_path) not in cache.problem
    assert not cache.put("key", CONDITIONING)  # not tried again in this run
    assert cache.get("before") == [1]
    assert os.listdir(tmp_path) == ["before.safetensors"]
    assert EncodingCache(tmp_path).put("key", CONDITIONING)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = EncodingCache(tmp_path / "file" / "cache")
    assert cache.get("key") is None
    assert not cache.put("key", [1])
    assert "cannot be kept" in cache.problem


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("fresh", 0)):
        (tmp_path / f".{name}.1.partial").write_text("half")
        os.utime(tmp_path / f".{name}.1.partial", (time.time() - age,) * 2)
    EncodingCache(tmp_path).put("key", [1])
    assert sorted(os.listdir(tmp_path)) == [".fresh.1.partial", "key.safetensors"]


def test_content_tells_kinds_shapes_and_order_apart() -> None:
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


def test_weights_are_known_again_and_any_training_of_them_is_noticed() -> None:
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


def test_weights_that_the_host_has_widened_are_the_same_weights() -> None:
    plain = dict((name, tensor) for name, tensor, _ in weights())
    assert weights_hash(weights(large=plain["large"].half())) == weights_hash(weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("count", [1, 7, 8 * COLUMNS - 1, 8 * COLUMNS, CHUNK, 2 * CHUNK + 8 * COLUMNS + 3])
def test_any_one_number_that_changes_is_noticed(dtype: torch.dtype, count: int) -> None:
    zeros = torch.zeros(count)
    first = hash_of(zeros.to(dtype))
    for place in {0, count // 2, count - 1}:
        other = zeros.clone()
        other[place] = 1
        assert hash_of(other.to(dtype)) != first, place


def hash_of(tensor: torch.Tensor) -> str:
    return weights_hash([("weight", tensor, None)])


def test_numbers_that_change_places_are_noticed() -> None:
    plain = torch.randn(CHUNK + 5 * COLUMNS, generator=torch.Generator().manual_seed(0))
    found = {hash_of(plain)}
    for one, other in ((0, 1), (0, 2), (0, 2 * COLUMNS), (3, 2 * COLUMNS + 8), (5, CHUNK), (CHUNK - 1, CHUNK + 5 * COLUMNS - 1)):
        turned = plain.clone()
        turned[[one, other]] = plain[[other, one]]
        found.add(hash_of(turned))
    assert len(found) == 7


def test_the_same_numbers_elsewhere_in_memory_are_known() -> None:
    plain = torch.randn(4, 64, 17, 19, generator=torch.Generator().manual_seed(0)).half()
    for before in range(1, 5):  # a file's weights begin anywhere in it
        longer = torch.cat([torch.zeros(before, dtype=torch.half), plain.reshape(-1)])
        assert hash_of(longer[before:].view(plain.shape)) == hash_of(plain)
    assert hash_of(plain.contiguous(memory_format=torch.channels_last)) == hash_of(plain)
    with torch.inference_mode():
        assert hash_of(plain.clone()) == hash_of(torch.nn.Parameter(plain, requires_grad=False)) == hash_of(plain)


def test_a_weight_without_values_cannot_be_known() -> None:
    with pytest.raises(UnhashableError, match="meta"):
        weights_hash([("a", torch.zeros(3, device="meta"), None)])


def test_hashing_weights_changes_and_moves_nothing() -> None:
    before = weights()
    facts = [(tensor.data_ptr(), tensor._version, tensor.clone()) for _, tensor, _ in before]
    weights_hash(before)
    for (_, tensor, _), (place, version, values) in zip(before, facts, strict=True):
        assert (tensor.data_ptr(), tensor._version) == (place, version) and torch.equal(tensor, values)


def test_the_limit_is_the_one_that_the_help_page_names() -> None:
    page = Path(__file__).parents[3] / "nodes" / "web" / "docs" / "ACLoRADataset.md"
    assert f"{encoding_cache.LIMIT >> 30} GB" in page.read_text(encoding="utf-8")
