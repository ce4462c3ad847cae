"""tools.tiny_base, trained for a few steps: on derived styles, from a finished base, within a time limit."""

import argparse
import json
import time

import pytest
import torch

from launcher.environment import ROOT
from tools.tiny_base import __main__ as script
from tools.tiny_base import denoiser, icons, text
from tools.tiny_base.derived_styles import DERIVED, style_words
from tools.tiny_base.icon_sets import BASE_STYLES

SHIPPED = ROOT / "assets" / "tiny_base"
CONCEPTS, STYLES = ["rocket", "house", "owl"], ["noto", "fluent", "twemoji"]


@pytest.fixture(scope="module")
def config(pack):
    """The text encoder's config of the shipped base."""
    return json.loads((SHIPPED / "config.json").read_text())["text"]


@pytest.fixture(scope="module")
def vae(pack):
    """The shipped autoencoder, as --start gives it."""
    return script.make_autoencoder(torch.zeros(1), argparse.Namespace(start=SHIPPED, work=None))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 128, 128, generator=generator).half()


@pytest.fixture(scope="module")
def learned(vae, images):
    return script.training_set(vae, images, CONCEPTS, STYLES, ["grey", "outline"], seed=0)


def trained(learned, config, tmp_path, steps=2, **rest):
    """Train on the images with the shipped vocabulary."""
    tokenizer = text.load_tokenizer(SHIPPED / "tokenizer")
    rows = script.all_wordings(learned.concepts, learned.styles)
    tokens = torch.stack([text.tokenize(tokenizer, row) for row in rows])
    empty = text.tokenize(tokenizer, [""])[0]
    schedule = denoiser.Schedule(steps, batch=2, warm_up=2)
    checkpoint = tmp_path / "denoiser.pt"
    return denoiser.train(
        learned.latents, tokens, empty, config, schedule, 0, checkpoint, compiled=False, odds=learned.odds, **rest
    ), torch.load(tmp_path / "denoiser.pt")["step"]


def test_derived_images_follow_the_icon_sets_with_captions_of_their_own(learned):
    assert learned.latents.shape == (2, 9, 16, 16, 16)
    assert learned.concepts == 3 * CONCEPTS
    derived = [f"{style} {name}" for name in ("grey", "outline") for style in STYLES]
    assert learned.styles == STYLES + derived
    assert learned.odds[3:].sum() / learned.odds.sum() == pytest.approx(script.DERIVED_SHARE)
    assert not torch.equal(learned.latents[:, :3], learned.latents[:, 3:6])


def test_without_derived_styles_there_are_the_icon_sets_alone(vae, images, learned):
    alone = script.training_set(vae, images, CONCEPTS, STYLES, (), seed=0)
    assert alone.styles == STYLES and torch.equal(alone.latents[:2], learned.latents[:, :3])


def test_every_caption_fits_into_the_text_encoder():
    tokenizer = text.load_tokenizer(SHIPPED / "tokenizer")
    longest = max(DERIVED, key=lambda name: len(tokenizer(name)["input_ids"]))
    for style in BASE_STYLES.values():
        words = icons.caption("face with open eyes and hand over mouth", style_words(style.word, longest))
        assert len(tokenizer(words)["input_ids"]) <= text.LENGTH


def test_images_without_odds_are_never_learned(learned, config):
    seen = []

    def model(noisy, t, tokens):
        seen.append(tokens[:, 0])
        return noisy

    tokens = torch.arange(9)[None, :, None]  # the caption tells which image it is
    odds = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1.0, 0])
    generator = torch.Generator().manual_seed(0)
    denoiser.training_step(model, learned.latents, tokens, torch.tensor([-1]), 64, generator, odds)
    assert set(seen[0].tolist()) == {-1, 0, 7}


def test_training_goes_on_from_a_finished_base(learned, config, tmp_path):
    start = script.started_pair(SHIPPED, config)
    pair, steps = trained(learned, config, tmp_path, start=start)
    assert steps == 2
    # New weights would differ by the size of the weights, two steps of AdamW move them by 0.002 at most.
    for name, weight in start.state_dict().items():
        assert (pair.state_dict()[name] - weight).abs().max() < 0.003, name
    assert any(not torch.equal(pair.state_dict()[name], weight) for name, weight in start.state_dict().items())


def test_a_training_is_shortened_to_its_time(learned, config, tmp_path):
    began = time.monotonic()
    pair, steps = trained(learned, config, tmp_path, steps=10**6, seconds=3.0, fit=True)
    assert pair is not None and 3 <= steps < 1000
    assert time.monotonic() - began < 60


def test_a_schedule_is_never_lengthened():
    schedule = denoiser.Schedule(100)
    assert schedule.shortened(10, pace=0.5, left=20).steps == 50
    assert schedule.shortened(10, pace=0.5, left=1000).steps == 100
    assert schedule.shortened(10, pace=0.5, left=-5).steps == 11
