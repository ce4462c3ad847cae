"""Checkpoints damaged at random: a training either goes on from a whole one to the same bits, or says what is wrong."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aclora_core.config import CheckpointConfig, TrainConfig
from aclora_core.training import Result
from tests.support import fuzz
from tests.support.toy import toy, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(steps=6, learning_rate=0.01, batch_size=4, max_rank=4, smallest=False)
HELD = replace(CONFIG, held_out=0.2, smallest=True, ema_decay=0.5)
ROUNDS = 40

Damage = Callable[[bytes, random.Random], bytes]


def flipped(blob: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(blob))
    return blob[:place] + bytes([blob[place] ^ (1 << chance.randrange(8))]) + blob[place + 1 :]


def shortened(blob: bytes, chance: random.Random) -> bytes:
    return blob[: chance.randrange(len(blob))]


def zeroed(blob: bytes, chance: random.Random) -> bytes:
    place, length = chance.randrange(len(blob)), chance.randrange(1, 600)
    return (blob[:place] + bytes(length) + blob[place + length :])[: len(blob)]


def moved(blob: bytes, chance: random.Random) -> bytes:
    """Two stretches of the file change places, as sectors of a drive might."""
    length = chance.randrange(8, 200)
    first, second = sorted(chance.sample(range(0, len(blob) - length, length), 2))
    parts = blob[:first], blob[second : second + length], blob[first + length : second]
    return b"".join(parts) + blob[first : first + length] + blob[second + length :]


def lengthened(blob: bytes, chance: random.Random) -> bytes:
    return blob + chance.randbytes(chance.randrange(1, 100))


def in_header(blob: bytes, chance: random.Random) -> bytes:
    """A digit, bracket or quote of the JSON becomes another."""
    end = 8 + int.from_bytes(blob[:8], "little")
    marks = b'0123456789[]{},:"'
    places = [place for place in range(8, end) if blob[place] in marks]
    place = chance.choice(places)
    return blob[:place] + bytes([chance.choice(marks)]) + blob[place + 1 :]


DAMAGES: tuple[Damage, ...] = (flipped, shortened, zeroed, moved, lengthened, in_header)


def bits(result: Result) -> list[torch.Tensor]:
    return [tensor for layer in result.adapter.layers.values() for tensor in (layer.lora_down, layer.lora_up)]


@pytest.mark.parametrize("config", [CONFIG, HELD], ids=["one pass", "two passes"])
def test_no_damage_changes_what_is_learned(tmp_path: Path, config: TrainConfig) -> None:
    checkpoints = CheckpointConfig(tmp_path / "whole", every=2, keep=10)
    whole = train(toy(16), config, checkpoints=checkpoints)
    chance = fuzz.chance(18)
    for number in range(ROUNDS):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(number)))
        paths = sorted(folder.iterdir())
        for path in chance.sample(paths, chance.randrange(1, len(paths))):  # one at least stays whole
            path.write_bytes(chance.choice(DAMAGES)(path.read_bytes(), chance))
        found = train(toy(16), config, checkpoints=CheckpointConfig(folder, every=100))
        assert found.report.losses == whole.report.losses
        assert all(torch.equal(*pair) for pair in zip(bits(found), bits(whole), strict=True))


def test_where_all_are_damaged_it_is_said_and_nothing_is_deleted(tmp_path: Path) -> None:
    train(toy(16), CONFIG, checkpoints=CheckpointConfig(tmp_path, every=2))
    paths, chance = sorted(tmp_path.iterdir()), fuzz.chance(1)
    for path in paths:
        path.write_bytes(shortened(path.read_bytes(), chance))
    before = {path.name: path.read_bytes() for path in paths}
    with pytest.raises(ValueError, match=f"None of the {len(paths)} checkpoints of '{tmp_path.name}' can be read"):
        train(toy(16), CONFIG, checkpoints=CheckpointConfig(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
