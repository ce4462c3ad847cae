"""Variants of the images in the real ComfyUI: mirrored, with shuffled tags, without captions."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.dataset_calls import Calls, assert_same, draw


@pytest.fixture
def calls(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(pack, monkeypatch)


def test_a_mirrored_image_has_the_latent_of_its_mirrored_pixels(calls: Calls, folder: Path) -> None:
    draw(folder / "2_more" / "3.png", 3)
    latents, conditioning = calls.run(flip=True).result
    assert len(latents) == len(conditioning) == 10
    assert [(each["aclora"]["picture"], each["aclora"]["variant"]) for each in latents] == [
        (index, variant) for index in range(5) for variant in range(2)
    ]
    plain = calls.run().result
    assert [set(each) for each in plain[0]] == [{"samples"}] * 5
    for number in range(5):
        assert conditioning[2 * number] is conditioning[2 * number + 1]
        torch.testing.assert_close(latents[2 * number]["samples"], plain[0][number]["samples"], rtol=0, atol=0)
        assert_same(conditioning[2 * number], plain[1][number])
    with Image.open(folder / "0.png") as image:
        image.crop((0, 0, 96, 64)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "0.png")
    mirrored = calls.run(cache=False).result[0][0]["samples"]
    torch.testing.assert_close(latents[1]["samples"], mirrored, atol=1e-4, rtol=1e-4)
    assert not np.allclose(mirrored.numpy(), latents[0]["samples"].numpy(), atol=1e-2)


def test_repeats_and_captions_of_an_image_share_its_latent_in_a_training(calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("ink, a, b, c")
    draw(folder / "2_more" / "3.png", 3)
    latents, conditioning = calls.run(flip=True, shuffles=2).result
    model = calls.pack.nodes.tiny_base.ACLoRATinyBase.execute().result[0]
    session = calls.pack.nodes.host.training_session(model, latents, conditioning, unconditional=conditioning[0])
    with torch.inference_mode(), session as (_, images):
        assert len(images.latents) == 2 * len(latents) > 16
        assert len({each.data_ptr() for each in images.latents}) == 8  # four images, each mirrored too
        for latent, scaled in zip(latents * 2, images.latents, strict=True):
            assert torch.equal(scaled, images.base.process_latent_in(latent["samples"].clone()))


def test_only_new_variants_are_encoded(calls: Calls, folder: Path) -> None:
    assert calls.encoded() == (3, 2)
    assert calls.encoded(flip=True) == (3, 0)
    assert calls.encoded(flip=True, caption_dropout=0.1) == (0, 1)
    (folder / "0.txt").write_text("a, b, c")
    assert calls.encoded(shuffles=2) == (0, 3)
    assert calls.encoded(flip=True, shuffles=2, caption_dropout=0.1) == (0, 0)


def test_shuffled_and_dropped_captions_come_with_their_own_image(calls: Calls, folder: Path) -> None:
    (folder / "0.txt").write_text("ink, a, b, c")
    latents, conditioning = calls.run(shuffles=3, caption_dropout=0.5).result

    def encoded(caption: str) -> Any:
        with torch.inference_mode():
            return calls.clip.encode_from_tokens_scheduled(calls.clip.tokenize(caption))

    of_first = [number for number, each in enumerate(latents) if each["aclora"]["picture"] == 0]
    assert len(of_first) == 8 and of_first == list(range(8))
    torch.testing.assert_close(conditioning[0][0][0], encoded("ink, a, b, c")[0][0])
    empty = encoded("")[0][0]
    assert [torch.allclose(conditioning[number][0][0], empty) for number in of_first] == [False] * 4 + [True] * 4
    assert all(latents[number]["samples"] is latents[0]["samples"] for number in of_first)
    # The other captions have one tag besides the trigger word, and no other order.
    assert [each["aclora"]["variant"] for each in latents[8:]] == [0, 1, 0, 1]


def test_a_broken_image_is_named_once(calls: Calls, folder: Path) -> None:
    cut = (folder / "0.png").read_bytes()[:-3000]
    (folder / "0.png").write_bytes(cut)
    output = calls.run(flip=True)
    assert len(output.result[0]) == 4
    assert output.ui["text"][0].count("0.png was skipped") == 1
