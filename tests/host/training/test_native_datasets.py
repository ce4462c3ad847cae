"""Training on what ComfyUI's own dataset nodes give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import tiny_base as tiny
from tests.support.dataset_calls import assert_same
from tests.support.train_node import train

parts, model = tiny.parts, tiny.model

CAPTIONS = {"a.png": "a rocket", "b.png": "a cat", "c.png": "a tall house", "d.png": ""}
SIZES = {"a.png": (128, 128), "b.png": (96, 160), "c.png": (128, 128), "d.png": (96, 160)}


@pytest.fixture
def folder(pack: ModuleType) -> Iterator[str]:
    """Four images of two sizes in ComfyUI's input folder."""
    import folder_paths

    path = Path(folder_paths.get_input_directory(), "native")
    path.mkdir(parents=True, exist_ok=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / name)
        if CAPTIONS[name]:
            (path / name).with_suffix(".txt").write_text(CAPTIONS[name], encoding="utf-8")
    yield path.name
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def made(parts: Any, folder: str) -> tuple[list[Any], list[Any]]:
    """The outputs of Load Image-Text (from Folder) and Make Training Dataset."""
    from comfy_extras.nodes_dataset import LoadImageTextDataSetFromFolderNode, MakeTrainingDataset

    with torch.inference_mode():
        images, texts = LoadImageTextDataSetFromFolderNode.execute(folder).result
        latents, conditioning = MakeTrainingDataset.execute(images, [parts[2]], [parts[1]], texts).result
    return latents, conditioning


def trained_on(pack: ModuleType, model: Any, outputs: tuple[list[Any], list[Any]]) -> Any:
    """Return the losses and the report of a short training."""
    settings = {"steps": 4, "batch_size": 2, "max_rank": 2, "layers": "attention"}
    _, lora, losses, report, _ = train(pack, model, *outputs, settings)
    assert all(torch.isfinite(each).all() for each in lora.values()) and len(losses["loss"]) == 4
    return losses["loss"], report


def test_make_training_dataset(pack: ModuleType, model: Any, made: Any) -> None:
    _, report = trained_on(pack, model, made)
    assert report.facts.images == 4


def test_resolution_bucket_is_split_into_its_images(pack: ModuleType, model: Any, made: Any) -> None:
    from comfy_extras.nodes_dataset import ResolutionBucket

    buckets = ResolutionBucket.execute(*made).result
    assert sorted(len(bucket["samples"]) for bucket in buckets[0]) == [2, 2]
    by_size = sorted(range(4), key=lambda index: [b["samples"].shape[-2:] for b in buckets[0]].index(size(made, index)))
    sorted_by_size = tuple([output[index] for index in by_size] for output in made)
    assert_same(pack.nodes.host.one_image_each(*buckets), sorted_by_size)
    losses, report = trained_on(pack, model, buckets)
    assert report.facts.images == 4 and losses == trained_on(pack, model, sorted_by_size)[0]


def size(made: Any, index: int) -> Any:
    return made[0][index]["samples"].shape[-2:]


def test_a_saved_training_dataset(pack: ModuleType, model: Any, made: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import folder_paths
    from comfy_extras.nodes_dataset import LoadTrainingDataset, SaveTrainingDataset

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", ([str(tmp_path)], set()))
    SaveTrainingDataset.execute(*made, ["kept"], [3])
    loaded = LoadTrainingDataset.execute("kept").result
    assert trained_on(pack, model, loaded)[0] == trained_on(pack, model, made)[0]


def test_our_dataset_through_the_hosts_nodes(
    pack: ModuleType, model: Any, parts: Any, folder: str, tmp_path: Path, monkeypatch: Any
) -> None:
    import folder_paths
    from comfy_extras.nodes_dataset import LoadTrainingDataset, ResolutionBucket, SaveTrainingDataset

    with torch.inference_mode():
        ours = pack.nodes.dataset.node.ACLoRADataset.execute(folder, parts[2], parts[1], 128, "ink", flip=True).result
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", ([str(tmp_path)], set()))
    SaveTrainingDataset.execute(*ours, ["ours"], [100])
    losses, report = trained_on(pack, model, LoadTrainingDataset.execute("ours").result)
    assert report.facts.images == 4 and losses == trained_on(pack, model, ours)[0]
    _, bucketed = trained_on(pack, model, ResolutionBucket.execute(*ours).result)
    assert bucketed.facts.images == 8  # the host's node forgets which are variants of one image


def test_a_batch_with_one_caption_is_still_refused(pack: ModuleType, model: Any, made: Any) -> None:
    latents, conditioning = made
    of_one_size = [each["samples"] for each in latents if each["samples"].shape == latents[0]["samples"].shape]
    with pytest.raises(ValueError, match="Latent 1 holds 2 images, which would share one caption"):
        trained_on(pack, model, ([{"samples": torch.cat(of_one_size)}], conditioning[:1]))


def test_masks_of_a_batch_go_with_their_images(pack: ModuleType) -> None:
    latent = {"samples": torch.zeros(2, 4, 8, 8), "noise_mask": torch.arange(2.0).view(2, 1, 1, 1), "type": "x"}
    entries = [[torch.zeros(1, 3, 5), {"number": number}] for number in range(2)]
    images, captions = pack.nodes.host.one_image_each([latent], [entries])
    assert [image["noise_mask"].item() for image in images] == [0, 1] and images[0]["type"] == "x"
    assert [caption[0][1]["number"] for caption in captions] == [0, 1]
