"""Files of the encoding cache damaged or exchanged at random: a value is the one of its key, or it is missing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from aclora_core.dataset.encoding_cache import EncodingCache
from tests.core.dataset.test_encoding_cache import CONDITIONING, same
from tests.support import fuzz

ROUNDS = 400


def damaged(blob: bytes, chance: random.Random) -> bytes:
    kind, place = chance.randrange(4), chance.randrange(len(blob))
    if kind == 0:
        return blob[:place] + bytes([blob[place] ^ (1 << chance.randrange(8))]) + blob[place + 1 :]
    if kind == 1:
        return blob[:place]
    if kind == 2:
        return blob[:place] + chance.randbytes(chance.randrange(1, 40)) + blob[place + chance.randrange(40) :]
    other = chance.randrange(len(blob))
    return blob[:place] + blob[other : other + 16] + blob[place + 16 :]


def test_no_damage_gives_another_value(tmp_path: Path) -> None:
    values: dict[str, Any] = {"caption": CONDITIONING, "image": torch.arange(24.0).view(1, 4, 2, 3), "small": [1, "a"]}
    cache, chance = EncodingCache(tmp_path), fuzz.chance(18)
    for key, value in values.items():
        assert cache.put(key, value)
    whole = {key: (tmp_path / f"{key}.safetensors").read_bytes() for key in values}
    for _ in range(ROUNDS):
        key = chance.choice(list(values))
        (tmp_path / f"{key}.safetensors").write_bytes(damaged(whole[chance.choice(list(values))], chance))
        found = EncodingCache(tmp_path).get(key)
        assert found is None or same(found, values[key])
    for key, blob in whole.items():
        for other in values:
            (tmp_path / f"{other}.safetensors").write_bytes(blob)
            assert (EncodingCache(tmp_path).get(other) is not None) is (other == key)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(structure=JSON, checksum=JSON)
def test_no_foreign_file_is_an_error(tmp_path_factory: pytest.TempPathFactory, structure: Any, checksum: Any) -> None:
    folder = tmp_path_factory.mktemp("cache")
    metadata = {"structure": json.dumps(structure), "checksum": json.dumps(checksum)}
    safetensors.torch.save_file({"0": torch.zeros(2)}, folder / "key.safetensors", metadata)
    assert EncodingCache(folder).get("key") is None


@pytest.mark.parametrize(
    "structure",
    [
        {"tensor": ["0", "cuda"]},
        {"tensor": ["0", "meta"]},
        {"tensor": ["0", "no device"]},
        {"tensor": 5},
        {"dict": []},
        {"list": None},
        {"a": 1, "b": 2},
    ],
)
def test_no_structure_is_an_error(tmp_path: Path, structure: Any) -> None:
    metadata = {"structure": json.dumps(structure), "checksum": "0" * 32}
    safetensors.torch.save_file({"0": torch.zeros(2)}, tmp_path / "key.safetensors", metadata)
    cache = EncodingCache(tmp_path)
    assert cache.get("key") is None and cache.put("key", [1]) and cache.get("key") == [1]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=6), inner, max_size=3)
        | st.lists(st.floats(width=32), max_size=4).map(torch.tensor)
    ),
    max_leaves=8,
)


@given(value=VALUES)
def test_every_value_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("cache")
    assert EncodingCache(folder).put("key", value)
    found = EncodingCache(folder).get("key")
    assert repr(found) == repr(value)
