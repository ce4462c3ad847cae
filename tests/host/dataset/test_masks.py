"""Masks, regularisation images and several resolutions in the real ComfyUI, from the files to the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.dataset_calls import Calls, draw
from tests.support.train_node import train

QUICK = {"steps": 3, "batch_size": 2, "max_rank": 4, "learning_rate": 1e-3, "mode": "off"}


@pytest.fixture
def calls(pack: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Images of 96 × 64, which are 80 × 48 at resolution 64, so 10 × 6 in latents."""
    return Calls(pack, monkeypatch)


@pytest.fixture
def plain(folder: Path) -> Any:
    """A second folder, with two images that are not in the style."""
    path = folder.with_name("plain")
    for number in range(2):
        draw(path / f"{number}.png", 50 + number)
        (path / f"{number}.txt").write_text("a thing")
    yield path
    shutil.rmtree(path)


def paint(path: Path, box: tuple[int, int, int, int] | None = (0, 0, 48, 64)) -> None:
    """A mask that is white in a box, or nowhere."""
    path.parent.mkdir(exist_ok=True)
    mask = Image.new("L", (96, 64))
    if box:
        mask.paste(255, box)
    mask.save(path)


def trained(calls: Calls, latents: list, conditioning: list, **settings: Any) -> Any:
    with torch.inference_mode():
        model = calls.pack.nodes.tiny_base.ACLoRATinyBase.execute().result[0]
    return train(calls.pack, model, latents, conditioning, QUICK | settings)


def test_masks_travel_with_their_latents_and_are_mirrored_with_them(calls: Calls, folder: Path) -> None:
    paint(folder / "0-masklabel.png")
    paint(folder / "masks" / "1.png", (0, 0, 96, 32))
    output = calls.run(flip=True)
    latents = output.result[0]
    assert calls.images == 6 and ["noise_mask" in each for each in latents] == [True] * 4 + [False] * 2
    masks = [each["noise_mask"] for each in latents[:4]]
    assert all(mask.shape == (1, 1, *latents[0]["samples"].shape[-2:]) for mask in masks)
    assert torch.equal(masks[0][..., :5], torch.ones(1, 1, 6, 5)) and not masks[0][..., 5:].any()
    assert torch.equal(masks[1], masks[0].flip(3)) and torch.equal(masks[2], masks[3])
    assert torch.equal(masks[2][:, :, :3], torch.ones(1, 1, 3, 10)) and not masks[2][:, :, 3:].any()
    assert "2 images with a mask" in output.ui["text"][0]
    assert not any("noise_mask" in each for each in calls.run(masks="off").result[0])


def test_a_mask_does_not_change_the_latents(calls: Calls, folder: Path) -> None:
    before = calls.run().result[0]
    paint(folder / "masks" / "1.png")
    after = calls.run().result[0]
    assert calls.images == 0 and len(after) == 3  # the mask is not a fourth image
    assert torch.equal(after[1]["samples"], before[1]["samples"])


def test_transparent_parts_are_masked_out_on_request(calls: Calls, folder: Path) -> None:
    pixels = np.array(Image.open(folder / "0.png").convert("RGBA"))
    pixels[:, 48:, 3] = 0
    Image.fromarray(pixels).save(folder / "0.png")
    assert "noise_mask" not in calls.run().result[0][0]
    mask = calls.run(masks="files or alpha").result[0][0]["noise_mask"]
    assert (mask[..., :5] == 1).all() and not mask[..., 5:].any()


def test_a_black_mask_is_refused_by_name_before_any_work(calls: Calls, folder: Path) -> None:
    paint(folder / "masks" / "1.png", None)
    with pytest.raises(ValueError, match=r"mask is all black.*: 1\.png\. Paint the parts"):
        calls.run()
    paint(folder / "masks" / "1.png", (0, 0, 1, 1))  # one pixel, lost in the mean of a latent position
    with pytest.raises(ValueError, match=r"mask is all black.*: 1\.png\. Paint the parts"):
        calls.run()
    assert calls.images == 0
    (folder / "masks" / "1.png").rename(folder / "masks" / "nobody.png")
    assert "1 mask without an image of the same name: masks/nobody.png." in calls.run().ui["text"][0]


def test_training_uses_masks_also_those_of_the_hosts_own_node(calls: Calls, folder: Path) -> None:
    import nodes

    latents, conditioning = calls.run().result
    paint(folder / "masks" / "0.png", (0, 0, 96, 32))
    masked = calls.run().result[0]
    whole = torch.zeros(1, 48, 80)
    whole[:, :24] = 1
    (by_host,) = nodes.SetLatentNoiseMask().set_mask(latents[0], whole)
    plain = trained(calls, latents, conditioning)
    ours, theirs = (trained(calls, each, conditioning) for each in (masked, [by_host, *latents[1:]]))
    for key, value in ours[1].items():
        assert torch.equal(value, theirs[1][key]), key
    assert ours[2] == theirs[2] != plain[2]
    whole.fill_(1)
    (white,) = nodes.SetLatentNoiseMask().set_mask(latents[0], whole)
    assert trained(calls, [white, *latents[1:]], conditioning)[2] == plain[2]
    assert trained(calls, masked, conditioning, mask_floor=1.0)[2] == plain[2]


def test_what_is_not_used_of_the_regularisation_images_is_told_as_theirs(calls: Calls, plain: Path) -> None:
    (plain / "notes.doc").touch()
    (plain / "masks").mkdir()
    draw(plain / "masks" / "nobody.png", 5)
    text = calls.run(regularisation="plain").ui["text"][0]
    assert "In the regularisation folder: not used, as neither images" in text and "nor captions: notes.doc." in text
    assert "1 mask without a regularisation image of the same name: masks/nobody.png." in text


def test_a_latent_with_a_bad_mask_is_refused_before_training(calls: Calls) -> None:
    latents, conditioning = calls.run().result
    black = {**latents[1], "noise_mask": torch.zeros(1, 1, 48, 80)}
    with pytest.raises(ValueError, match="The mask of latent 2 is all black"):
        trained(calls, [latents[0], black, latents[2]], conditioning)
    double = {**latents[1], "noise_mask": torch.ones(2, 1, 48, 80)}
    with pytest.raises(ValueError, match="The mask of latent 2 holds 2 images"):
        trained(calls, [latents[0], double, latents[2]], conditioning)


def test_regularisation_images_come_last_without_the_trigger_word(calls: Calls, plain: Path) -> None:
    before = calls.run().result
    output = calls.run(regularisation="plain", regularisation_weight=0.5)
    latents, conditioning = output.result
    assert (calls.images, calls.captions) == (2, 1) and calls.encoded(regularisation="plain") == (0, 0)
    weights = [each.get("aclora", {}).get("regularisation") for each in latents]
    assert weights == [None] * 3 + [0.5] * 2
    for one, other in zip(latents, before[0], strict=False):
        assert torch.equal(one["samples"], other["samples"])
    assert [cond[0][1]["aclora_caption"] for cond in conditioning][2:] == ["ink, a cat", "a thing", "a thing"]
    assert "2 regularisation images, with a weight of 0.5 each: all at 80 × 48." in output.ui["text"][0]
    report = trained(calls, latents, conditioning, steps=5)[3]
    assert report.facts.images == 3 and report.facts.regularisation_images == 2


def test_the_regularisation_folder_may_lie_in_the_other_but_not_be_it(calls: Calls, folder: Path) -> None:
    draw(folder / "reg" / "r.png", 9)
    assert len(calls.run().result[0]) == 4
    output = calls.run(regularisation="kept/reg")
    assert len(output.result[0]) == 4 and "3 images: " in output.ui["text"][0]
    assert "1 regularisation image without a caption; describe what it shows: r.png." in output.ui["text"][0]
    for name, sentence in {
        "kept": 'the folder "kept" is chosen for the style too',
        "nowhere": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=f"^regularisation: .*{sentence}"):
            calls.run(regularisation=name)
        assert (calls.images, calls.captions) == (0, 0)
    node = calls.pack.nodes.dataset.node.ACLoRADataset
    prints = [node.fingerprint_inputs("kept", None, None, 64, "", regularisation=r) for r in ("none", "kept/reg")]
    assert prints[0] != prints[1]


def test_more_regularisation_than_style_images_are_reported(calls: Calls, plain: Path) -> None:
    for number in range(2, 4):
        draw(plain / f"{number}.png", 50 + number)
    said = calls.run(regularisation="plain").ui["text"][0]
    assert "An epoch has 4 regularisation images and 3 of the style" in said


def test_an_image_comes_in_the_further_sizes_that_it_is_large_enough_for(calls: Calls, folder: Path) -> None:
    draw(folder / "big.png", 7)
    with Image.open(folder / "big.png") as image:
        image.resize((192, 128)).save(folder / "big.png")
    paint(folder / "masks" / "big.png")
    output = calls.run(more_resolutions="96, 128", flip=True)
    shown = [(each["aclora"]["picture"], each["aclora"]["variant"]) for each in output.result[0]]
    assert shown == [(index, variant) for index in range(3) for variant in range(2)] + [
        (3, variant) for variant in range(6)
    ]
    sizes = [tuple(each["samples"].shape[-2:]) for each in output.result[0]]
    assert set(sizes[:6]) == {(6, 10)} and sizes[6] == sizes[7] == (6, 10)  # the resolution's own comes first
    assert sizes[8] == sizes[9] < sizes[10] == sizes[11]
    assert "3 images smaller than resolution 128, so left out there: 0.png, 1.png, 2.png." in output.ui["text"][0]
    for each in output.result[0][-6:]:
        assert each["noise_mask"].shape[-2:] == each["samples"].shape[-2:]
    assert calls.encoded(more_resolutions="96, 128", flip=True) == (0, 0)
    report = trained(calls, *output.result, steps=6)[3]
    assert report.facts.images == 4 and len(report.losses) == 6
    with pytest.raises(ValueError, match='^more_resolutions has to be .* but one is "big"'):
        calls.run(more_resolutions="big")
    assert (calls.images, calls.captions) == (0, 0)
