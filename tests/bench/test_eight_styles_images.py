"""bench.eight_styles: the file of images is written and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.eight_styles import images
from bench.eight_styles.studio import digest_of_encoders
from bench.no_search import images as verdict_images
from tools.tiny_base import icons, judge
from tools.tiny_base.icon_sets import ALL_STYLES, HELD_OUT_STYLES

CONCEPTS = [f"thing {number}" for number in range(30)]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file of made-up icons: every concept is a shade of grey, every style is drawn the same."""
    monkeypatch.setattr(icons, "fetch", lambda cache, styles=None: [])
    monkeypatch.setattr(icons, "load_set", lambda cache, style: {concept: concept for concept in CONCEPTS})
    monkeypatch.setattr(icons, "render_many", _shades)
    path = tmp_path / "folder" / "images.zip"
    images.prepare(tmp_path, path, training=3, verdict=2)
    return path


def _shades(concepts: list[str], size: int = 128) -> np.ndarray:
    return np.stack([np.full((size, size, 3), 8 * CONCEPTS.index(concept), np.uint8) for concept in concepts])


def test_the_file_has_training_and_test_images_of_the_held_out_styles(file: Path) -> None:
    found = verdict_images.read(file)
    assert list(found) == list(HELD_OUT_STYLES)
    for style in found.values():
        assert (len(style.training.captions), len(style.verdict.captions)) == (3, 2)
        assert not set(style.training.captions) & set(style.verdict.captions)
        assert style.training.images.shape == (3, 128, 128, 3)


def test_the_judge_reads_every_image_of_all_styles(file: Path) -> None:
    found = images.read_judge(file)
    assert found.style_names == list(ALL_STYLES) and found.names == sorted(CONCEPTS)
    assert found.images.shape == (len(ALL_STYLES) * len(CONCEPTS), judge.SIZE, judge.SIZE, 3)
    for image, concept in zip(found.images, found.concepts, strict=True):
        shade = 8 * CONCEPTS.index(found.names[concept])
        assert abs(int(image[30, 30, 0]) - shade) <= 3  # WEBP is lossy
    assert [found.styles.count(number) for number in range(len(ALL_STYLES))] == [len(CONCEPTS)] * len(ALL_STYLES)


def test_captions_lead_to_their_concepts(file: Path) -> None:
    found, captions = images.read_judge(file), verdict_images.read(file)["openmoji"].verdict.captions
    assert [
        icons.caption(found.names[number], "").rsplit(",", 1)[0] for number in found.concepts_of(captions)
    ] == captions
    with pytest.raises(KeyError, match="a unicorn"):
        found.concepts_of(["a unicorn"])


def test_another_base_does_not_use_the_encodings_of_this_one(tmp_path: Path) -> None:
    digests = set()
    for text_encoder, autoencoder in ((b"a", b"b"), (b"a", b"c"), (b"d", b"b"), (b"a", b"b")):
        (tmp_path / "text_encoder.safetensors").write_bytes(text_encoder)
        (tmp_path / "autoencoder.safetensors").write_bytes(autoencoder)
        digests.add(digest_of_encoders(tmp_path))
    assert len(digests) == 3
