"""LoRA files at random, of a fixed seed: each is read with a true remark, or refused by a sentence of ours."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aclora_core.adapter import (
    Adapter,
    ResizeConfig,
    build_metadata,
    decompose,
    from_state_dict,
    load,
    read_lora,
    resize,
    save,
    to_state_dict,
)
from aclora_core.adapter.key_formats import KEY_FORMATS, SUFFIXES
from aclora_core.inspection import inspect_lora, inspection_table, metadata_table
from tests.support import fuzz

FILES = 250  # of each kind
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64]
ODD_DTYPES = [torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e5m2]
ODD_NAMES = [
    "bundle_emb.ink.emb",
    "nothing",
    "",
    "x.lora_B.bias",
    "x.scalar",
    "x.lora_A.style.weight",
    "墨.lora_up.weight",
]
CODES = ["F32", "F16", "BF16", "I8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "U64", "nonsense", ""]


def random_tensor(rng: random.Random, dtypes: list[torch.dtype]) -> Tensor:
    shape = [rng.choice([0, 1, 2, 3, 4]) for _ in range(rng.choice([0, 1, 2, 2, 2, 4]))]
    return torch.ones(shape).to(rng.choice(dtypes))


def random_lora(rng: random.Random) -> dict[str, Tensor]:
    """Whole layers, of which some keys are lost, changed, doubled or strange."""
    state: dict[str, Tensor] = {}
    for number in range(rng.randint(1, 4)):
        form, rank = rng.choice(KEY_FORMATS), rng.choice([0, 1, 2, 3])
        base, dtype = f"diffusion_model.blocks.{number}.to_q", rng.choice(DTYPES)
        state[base + form.up] = torch.full((6, rank), 0.5).to(dtype)
        state[base + form.down] = torch.full((rank, 5), 0.5).to(dtype)
        if rng.random() < 0.5:
            state[f"{base}.alpha"] = torch.tensor(2.0)
        if rng.random() < 0.4:
            state[base + rng.choice(SUFFIXES)] = random_tensor(rng, DTYPES + ODD_DTYPES)
    for _ in range(rng.randint(0, 2)):
        state[rng.choice(ODD_NAMES)] = random_tensor(rng, DTYPES)
    for key in rng.sample(sorted(state), k=min(len(state) - 1, rng.choice([0, 0, 1, 2]))):
        state.pop(key)
    return state


def random_metadata(rng: random.Random) -> dict[str, str]:
    values = ["1", "Dynamic", "nan", "", "{}", "[1]", '{"transformer.lora_alpha": "x"}', "0x" + "0" * 64, "墨" * 50]
    keys = ["ss_network_alpha", "lora_adapter_metadata", "aclora.settings", "aclora.trajectory", "aclora.ranks"]
    keys += ["modelspec.trigger_phrase", "ss_tag_frequency", "modelspec.hash_sha256", "ss_training_comment"]
    return {key: rng.choice(values) for key in rng.sample(keys, rng.randint(0, 4))}


def check(adapter: Adapter, state: dict[str, Tensor]) -> None:
    """Check that every tensor is used or named, and that all that reads adapters takes this one."""
    told = {*adapter.layers, *adapter.other, *adapter.left_out}
    unnamed = [key for key in state if not any(key.startswith(name) for name in told)]
    assert all(".lora_" in key for key in unnamed)  # keys of named adapters are spelled otherwise after reading
    table = metadata_table("x", adapter)
    assert all(f"'{name}'" in table or " more" in table for name in adapter.left_out)
    again = from_state_dict(to_state_dict(adapter))
    assert (again.layers.keys(), again.other) == (adapter.layers.keys(), adapter.other)
    if adapter.layers:
        resize(adapter, decompose(adapter), ResizeConfig("fixed", 1))


def is_ours(error: Exception) -> bool:
    """Whether an error is a sentence that names a key, a layer or the file."""
    return type(error) is ValueError and str(error).endswith(".") and "\n" not in str(error)


@pytest.mark.parametrize("part", range(5))
def test_odd_layers_are_read_or_refused_in_a_sentence(part: int, tmp_path: Path) -> None:
    rng = fuzz.chance(part)
    read = 0
    for _ in range(FILES // 5):
        state, metadata = random_lora(rng), random_metadata(rng)
        try:
            adapter = from_state_dict(state, metadata)
        except ValueError as error:
            assert is_ours(error)
            continue
        read += 1
        check(adapter, state)
        inspection_table(inspect_lora(state, metadata))
        written = build_metadata(adapter, "ink")
        save(adapter, tmp_path / "ink.safetensors", written)
        assert load(tmp_path / "ink.safetensors").layers.keys() == adapter.layers.keys()
        assert written.get("modelspec.trigger_phrase", "") == metadata.get("modelspec.trigger_phrase", "")
    assert read > FILES // 10  # most of them have a layer that can be used


def damaged(rng: random.Random, blob: bytes) -> bytes:
    """A file whose header or length is changed."""
    length = struct.unpack("<Q", blob[:8])[0]
    kind = rng.choice(["bytes", "end", "length", "table"])
    if kind == "bytes":
        changed = bytearray(blob)
        for _ in range(rng.randint(1, 5)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == "end":
        return blob[: rng.randrange(len(blob))]
    if kind == "length":
        return struct.pack("<Q", rng.choice([0, 1, length - 8, length + 8, 2**31, 2**63])) + blob[8:]
    header = json.loads(blob[8 : 8 + length])
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    entry[rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice([*CODES, [0], [-1, 4], [2**62, 2], None, {}])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob[8 + length :]


def test_damaged_files_are_read_or_refused_in_a_sentence_that_names_them(tmp_path: Path) -> None:
    rng = fuzz.chance(0)
    whole, path = tmp_path / "whole.safetensors", tmp_path / "damaged.safetensors"
    matrices = {"x.lora_up.weight": torch.ones(6, 2), "x.lora_down.weight": torch.ones(2, 5), "x.scalar": torch.ones(1)}
    save(from_state_dict(matrices), whole, {"title": "ink"})
    refused = 0
    for _ in range(FILES):
        path.write_bytes(damaged(rng, whole.read_bytes()))
        try:
            tensors = read_lora(path)
            load(path)
            inspect_lora(tensors)
        except ValueError as error:
            refused += 1
            assert "damaged.safetensors" in str(error) or is_ours(error)
    assert refused > FILES // 3


def test_every_flipped_bit_in_the_numbers_of_a_file_of_this_package_is_found(tmp_path: Path) -> None:
    rng = fuzz.chance(0)
    path = tmp_path / "ink.safetensors"
    adapter = from_state_dict({"x.lora_up.weight": torch.ones(6, 2), "x.lora_down.weight": torch.ones(2, 5)})
    save(adapter, path, build_metadata(adapter, "ink"))
    blob = path.read_bytes()
    start = 8 + struct.unpack("<Q", blob[:8])[0]
    for _ in range(50):
        changed = bytearray(blob)
        changed[rng.randrange(start, len(blob))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"ink\.safetensors is damaged"):
            load(path)
