"""Whatever stands in a caption file: a caption within the limits, or an error that names the file."""

from __future__ import annotations

import random
import time
import unicodedata
from pathlib import Path

import pytest

from aclora_core.dataset.augmentation import variants
from aclora_core.dataset.captions import MAX_CAPTIONS, MAX_LENGTH, ImageFiles, match_captions, read_captions
from aclora_core.dataset.names import folded
from aclora_core.dataset.tags import COMMAS, shuffle_tags, split_tags, with_trigger
from tests.support import fuzz

ROUNDS = 400
PIECES = [
    *'()[]{}（）「」“”"\\|:,，、 \n\r\t',
    *("a cat", "ink", "INK", "ink, flat", "(a:1.3)", "\\(b\\)", "embedding:x", ":(", "{a|b}", "<lora:x:1>", "it's"),
    *(
        "é",
        "e\u0301",
        "ガ",
        "🐈",
        "\u200d",
        "\u202e",
        "\ufeff",
        "\u2028",
        "\0",
        "ß",
        "İ",
        "<|endoftext|>",
        "word " * 50,
    ),
]


def text_of(generator: random.Random) -> str:
    return "".join(generator.choices(PIECES, k=generator.randrange(40)))


def letters(text: str) -> list[str]:
    return sorted(char for char in text if char not in COMMAS and not char.isspace())


def bytes_of(generator: random.Random) -> bytes:
    kind = generator.randrange(5)
    if kind == 0:
        return generator.randbytes(generator.randrange(300))
    if kind == 1:
        return text_of(generator).encode(generator.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"]))
    if kind == 2:
        return (text_of(generator) * generator.randrange(400)).encode()
    data = bytearray(text_of(generator).encode("utf-8-sig"))
    if kind == 3 and data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_every_file_gives_captions_or_an_error_that_names_it(tmp_path: Path, seed: int) -> None:
    generator = fuzz.chance(seed)
    files = ImageFiles(tmp_path / "a.png", "a.png", tmp_path / "a.txt", 1)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(ROUNDS):
        (tmp_path / "a.txt").write_bytes(bytes_of(generator))
        try:
            captions = read_captions(files, generator.choice(["one per epoch", "joined"]))
        except ValueError as error:
            assert "a.txt" in str(error) and len(str(error)) < 300
            outcomes["refused"] += 1
            continue
        assert len(captions) <= MAX_CAPTIONS
        for caption in captions:
            assert 0 < len(caption) <= MAX_LENGTH
            assert caption == unicodedata.normalize("NFC", " ".join(caption.split())) and "\0" not in caption
        outcomes["read"] += 1
    assert min(outcomes.values()) > ROUNDS // 10


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_the_tags_loses_or_tears_one(seed: int) -> None:
    generator = fuzz.chance(seed)
    for _ in range(ROUNDS):
        caption = " ".join(text_of(generator).split())
        trigger = generator.choice(["", "ink", "ink, flat", "(ink", ","])
        written = with_trigger(caption, trigger)
        assert with_trigger(written, trigger) == written
        orders = shuffle_tags(written, 4, generator.randrange(4), trigger)
        assert orders[0] == written and len(set(orders)) == len(orders) <= 5
        for order in orders:
            assert all(tag in order for tag in split_tags(written))
            assert letters(order) == letters(written)
        drawn = variants(written, True, 3, 1, generator.choice([0.0, 0.1, 0.5]), 2, (caption, "b"), trigger)
        assert drawn[0].caption == written and len(drawn) < 2000


def test_the_worst_captions_take_no_time() -> None:
    started = time.monotonic()
    for piece in ("(", ")", "()", "(]", "[(", '"', ' "', ",", "((]", "a,", "ink ", "(" * 50 + "]" * 50):
        caption = (piece * MAX_LENGTH)[:MAX_LENGTH]
        written = with_trigger(caption, "ink")
        assert written
        shuffle_tags(written, 2, 1, "ink")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("seed", range(4))
def test_an_image_gets_a_caption_of_its_own_name_only(seed: int) -> None:
    generator = fuzz.chance(seed)
    for _ in range(ROUNDS):
        names = {"".join(generator.choices("aAéÉe\u0301.ßsS_ 1", k=generator.randrange(1, 5))) for _ in range(6)}
        images = [name + generator.choice([".png", ".JPG"]) for name in sorted(names)]
        texts = [name + generator.choice([".txt", ".CAPTION", ".png.txt"]) for name in sorted(names)]
        for image, text in match_captions(images, [*images, *texts]).items():
            stem, whole = folded(image.rpartition(".")[0]), folded(image)
            assert folded(text.rpartition(".")[0]) in (stem, whole)
            assert text in texts
