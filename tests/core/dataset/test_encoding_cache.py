"""The encoding cache: exact, bounded, and never an obstacle."""

from __future__ import annotations

import errno
import json
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
    found[0][0].add_(1)  # has its own memory, which can be changed
    assert same(EncodingCache(tmp_path / "new").get("key"), CONDITIONING)
    assert EncodingCache(tmp_path / "new").get("other") is None
    assert os.listdir(tmp_path / "new") == ["key.safetensors"]


def test_views_and_shared_tensors_are_stored_by_value(tmp_path: Path) -> None:
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
def test_values_that_cannot_be_restored_exactly_are_not_stored(tmp_path: Path, value: Any) -> None:
    cache = EncodingCache(tmp_path)
    assert not cache.put("key", value)
    assert cache.get("key") is None and cache.problem == "" and os.listdir(tmp_path) == []
    assert cache.put("key", [1])  # and the next one is


def test_a_file_damaged_anywhere_counts_as_missing_and_is_rewritten(tmp_path: Path) -> None:
    EncodingCache(tmp_path).put("key", CONDITIONING)
    path = tmp_path / "key.safetensors"
    whole = path.read_bytes()
    generator = random.Random(0)
    damaged = [b"", whole[:7], whole[:-1], whole[: len(whole) // 2], b"x" * len(whole), whole.replace(b"3.5", b"4.5")]
    for _ in range(200):
        index = generator.randrange(len(whole))
        damaged.append(whole[:index] + bytes([whole[index] ^ (1 << generator.randrange(8))]) + whole[index + 1 :])
    for blob in damaged:
        path.write_bytes(blob)
        # A changed space, or a changed key that nothing reads, leaves the value as it was.
        found = EncodingCache(tmp_path).get("key")
        assert found is None or same(found, CONDITIONING)
    path.write_bytes(whole[:-1])
    cache = EncodingCache(tmp_path)
    assert cache.get("key") is None
    assert cache.put("key", CONDITIONING)
    assert same(EncodingCache(tmp_path).get("key"), CONDITIONING)


def test_a_foreign_file_counts_as_missing(tmp_path: Path) -> None:
    safetensors.torch.save_file({"0": torch.zeros(2)}, tmp_path / "bare.safetensors")
    structure = json.dumps({"list": [{"tensor": ["9", "cpu"]}]})
    facts = {"structure": structure, "checksum": ""}
    safetensors.torch.save_file({"0": torch.zeros(2)}, tmp_path / "missing.safetensors", facts)
    cache = EncodingCache(tmp_path)
    assert cache.get("bare") is None and cache.get("missing") is None


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def test_the_least_recently_used_files_are_removed_first(tmp_path: Path) -> None:
    latent = torch.zeros(1000)
    for age, key in enumerate(("new", "middle", "old")):
        EncodingCache(tmp_path).put(key, latent)
        os.utime(tmp_path / f"{key}.safetensors", (time.time() - 60 * age,) * 2)
    size = (tmp_path / "old.safetensors").stat().st_size
    assert EncodingCache(tmp_path, limit=3 * size).get("old") is not None  # used now
    assert EncodingCache(tmp_path, limit=3 * size).put("next", latent)
    assert files(tmp_path) == {"new", "old", "next"}


def test_a_dataset_over_the_limit_keeps_as_much_as_fits(tmp_path: Path) -> None:
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


def test_overwriting_counts_once_and_a_value_over_the_limit_removes_nothing(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, limit=20_000)
    assert all(cache.put("same", torch.full((2000,), float(number))) for number in range(10))
    assert not EncodingCache(tmp_path, limit=20_000).put("huge", torch.zeros(20_000))
    assert float(EncodingCache(tmp_path).get("same")[0]) == 9


def test_a_full_disk_is_reported_once_and_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = EncodingCache(tmp_path / "file" / "cache")
    assert cache.get("key") is None
    assert not cache.put("key", [1])
    assert "cannot be stored" in cache.problem


def test_partial_files_of_a_crash_are_removed(tmp_path: Path) -> None:
    for name, age in (("old", 60), ("fresh", 0)):
        half = tmp_path / f".{name}.safetensors.1.partial"
        half.write_text("half")
        os.utime(half, (time.time() - age,) * 2)
    EncodingCache(tmp_path).put("key", [1])
    assert sorted(os.listdir(tmp_path)) == [".fresh.safetensors.1.partial", "key.safetensors"]


def test_a_file_under_the_name_of_another_key_counts_as_missing(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path)
    cache.put("one", torch.ones(3))
    (tmp_path / "one.safetensors").rename(tmp_path / "other.safetensors")
    assert EncodingCache(tmp_path).get("other") is None and EncodingCache(tmp_path).get("one") is None


def test_the_reason_is_the_true_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "fsync", refuse)
    cache = EncodingCache(tmp_path)
    assert not cache.put("key", [1])
    assert "(Permission denied)" in cache.problem and "space" not in cache.problem
    assert "Look whether its folder may be written to" in cache.problem


def test_the_help_page_names_the_limit() -> None:
    page = Path(__file__).parents[3] / "nodes" / "web" / "docs" / "ACLoRADataset.md"
    assert f"{encoding_cache.LIMIT >> 30} GB" in page.read_text(encoding="utf-8")
