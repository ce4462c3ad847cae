"""Fixtures for the tests of training: the tiny base, two images, and a check that a MODEL is unchanged."""

import contextlib
import importlib
from unittest.mock import patch

import pytest
import torch

from tests.support.train_node import train

SHORT, LONG = "a red diamond, mine style", "a blue ball " + "on a quiet white page " * 8
QUICK = {"steps": 3, "batch_size": 2, "max_rank": 4, "learning_rate": 1e-3}
DENOISER = "diffusion_model."


@pytest.fixture(scope="module")
def parts(pack):
    """The tiny base's MODEL, CLIP and VAE, loaded in inference mode as in ComfyUI's nodes."""
    with torch.inference_mode():
        return pack.nodes.tiny_base.ACLoRATinyBase.execute().result


@pytest.fixture
def model(parts):
    return parts[0]


def caption(parts, text):
    with torch.inference_mode():
        return parts[1].encode_from_tokens_scheduled(parts[1].tokenize(text))


@pytest.fixture(scope="module")
def pictures(parts):
    """Two latents, of a diamond and of a ball, and their captions, made in inference mode too."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    drawn = torch.ones(2, 128, 128, 3)
    drawn[0][x.abs() + y.abs() < 0.7] = torch.tensor([0.9, 0.1, 0.1])
    drawn[1][x.square() + y.square() < 0.5] = torch.tensor([0.1, 0.2, 0.9])
    with torch.inference_mode():
        latents = [{"samples": parts[2].encode(picture[None])} for picture in drawn]
    return latents, [caption(parts, SHORT), caption(parts, "a blue ball, mine style")]


def trained(pack, model, latents, conditioning, previews=None, clip=None, unconditional=None, **settings):
    """Run the training node and return its outputs."""
    others = {"previews": previews, "clip": clip, "unconditional": unconditional}
    return train(pack, model, latents, conditioning, QUICK | settings, **others)


def first_step(model, conditioning, seed=3):
    """Return the denoised latent of pure noise: one step of ComfyUI's KSampler without guidance."""
    import nodes

    channels = model.model.latent_format.latent_channels
    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, channels, 16, 16)}
        drawn = nodes.common_ksampler(model, seed, 1, 1.0, "euler", "simple", conditioning, conditioning, empty)
    return drawn[0]["samples"]


def state_of(model):
    """Return the state of a MODEL that a training must not change, with its own patches applied."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    modules = dict(model.model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: weight.clone() for name, weight in model.model.state_dict().items()},
        "gradients": {name: (p.requires_grad, p.grad is None, p.dtype) for name, p in model.model.named_parameters()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
        "modules": {name: (id(module), module.training) for name, module in modules.items()},
        "patches": {name: list(map(id, patches)) for name, patches in model.patches.items()},
        "object patches": {name: id(patch) for name, patch in model.object_patches.items()},
        "options": repr(model.model_options),
    }


@contextlib.contextmanager
def untouched(model):
    """Fail if the block changes the MODEL, or global settings of ComfyUI."""
    import comfy.model_management

    before = state_of(model)
    yield
    assert not comfy.model_management.in_training
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    after = state_of(model)
    for name, weight in before.pop("weights").items():
        assert torch.equal(weight, after["weights"][name]), name
    for kind, value in before.items():
        assert value == after[kind], kind


@contextlib.contextmanager
def progress(hook):
    """Call the hook with every progress; ComfyUI's server gets one in a tenth of a second."""
    import comfy.utils

    hooked = {
        "PROGRESS_BAR_HOOK": lambda value, total, preview, **other: hook(value, total, preview),
        "PROGRESS_THROTTLE_MIN_INTERVAL": 0,
        "PROGRESS_THROTTLE_MIN_PERCENT": 0,
    }
    with patch.multiple(comfy.utils, create=True, **hooked):  # older versions have no throttle
        yield


@pytest.fixture
def interrupt():
    """ComfyUI's Cancel; reset at the end of the test."""
    import comfy.model_management

    yield lambda: comfy.model_management.interrupt_current_processing(True)
    comfy.model_management.interrupt_current_processing(False)


def open_training(pack, model, latents, conditioning):
    return pack.nodes.host.training_session(model, latents, conditioning)


def denoising_loss(pack, model, latents, captions):
    """Return the loss at fixed noise and noise levels, with the model's patches applied."""
    with torch.inference_mode(), open_training(pack, model, latents, captions) as (frozen, images):
        fixed_noise = importlib.import_module(f"{pack.__name__}.aclora_core.training.fixed_noise")
        return fixed_noise.mean_denoising_loss(frozen, images, range(len(latents)), 5)


def answer(frozen, images, noisy, sigma, numbers):
    """Return the denoised latents, each with its own caption."""
    return frozen.denoise(noisy, sigma, images.conditioning(numbers))


def noisy_pair(frozen, images):
    noise = torch.randn(2, *images.latents[0].shape[1:], generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.4, 0.9])
    return frozen.objective.add_noise(sigma, noise, torch.cat(images.latents[:2])), sigma
