"""The tiny base in the real ComfyUI: it loads whole and quietly, and the host's own nodes draw with it."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

PARTS = {"denoiser": 0, "text_encoder": 1, "autoencoder": 2}


@pytest.fixture(scope="module")
def loaded(pack):
    """MODEL, CLIP and VAE, made as the host runs nodes, and what was said meanwhile."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with torch.inference_mode():
            parts = pack.nodes.tiny_base.ACLoRATinyBase.execute().result
    finally:
        logging.getLogger().removeHandler(handler)
    return parts, said


def encoded(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def drawn(loaded, prompt, seed=1, steps=8, cfg=4.0):
    """An image (height, width, 3) through the host's own KSampler and VAEDecode."""
    import nodes

    model, clip, vae = loaded[0]
    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, 16, 16, 16)}
        latent = nodes.common_ksampler(
            model, seed, steps, cfg, "euler", "simple", encoded(clip, prompt), encoded(clip, ""), empty
        )
        return nodes.VAEDecode().decode(vae, latent[0])[0][0]


def state_dicts(loaded):
    model, clip, vae = loaded[0]
    return [part.state_dict() for part in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model)]


def test_loading_logs_nothing_about_missing_or_unexpected_keys(loaded):
    assert loaded[1] == []


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_of_the_file_is_used_and_every_weight_comes_from_it(loaded, pack, part):
    file = load_file(pack.nodes.tiny_base.FOLDER / f"{part}.safetensors")
    weights = state_dicts(loaded)[PARTS[part]]
    used = set()
    for key, tensor in file.items():
        names = [name for name in weights if name == key or name.endswith("." + key)]
        assert len(names) == 1, key
        torch.testing.assert_close(weights[names[0]].float(), tensor.float(), rtol=0, atol=0)
        used.add(names[0])
    assert {name for name in weights if not name.endswith(("logit_scale", "vae_scale"))} <= used


def test_its_parts_are_of_the_kinds_that_the_stock_nodes_expect(loaded, pack):
    model, clip, vae = loaded[0]
    assert type(model.model.model_config).__name__ == "SD3"
    assert model.model.latent_format.latent_channels == vae.latent_channels == 16
    sampling = model.model.model_sampling
    assert sampling.percent_to_sigma(0.25) == 0.75  # no shift of the timesteps
    total = sum((pack.nodes.tiny_base.FOLDER / f"{part}.safetensors").stat().st_size for part in PARTS)
    assert total <= 48_000_000


def test_sampling_gives_images_that_follow_the_prompt_and_the_seed(loaded):
    rocket, again = drawn(loaded, "a rocket, noto style"), drawn(loaded, "a rocket, noto style")
    assert rocket.shape == (128, 128, 3) and torch.isfinite(rocket).all()
    assert rocket.min() >= 0 and rocket.max() <= 1 and rocket.std() > 0.1
    # Icons stand on white: the corners are light, the middle is not.
    corners = torch.stack([rocket[:8, :8], rocket[:8, -8:], rocket[-8:, :8], rocket[-8:, -8:]])
    assert corners.mean() > 0.85 > rocket[40:88, 40:88].mean()
    torch.testing.assert_close(rocket, again, rtol=0, atol=1e-5)
    assert (rocket - drawn(loaded, "a dog, noto style")).abs().mean() > 0.05
    assert (rocket - drawn(loaded, "a rocket, noto style", seed=2)).abs().mean() > 0.004


def test_a_prompt_longer_than_the_text_model_goes_in_whole(loaded, pack):
    import nodes

    clip = loaded[0][1]
    text = " ".join(f"a rocket beside house number {number}," for number in range(20))
    with torch.inference_mode():
        short, long = (nodes.CLIPTextEncode().encode(clip, words)[0] for words in ("a rocket", text))
        changed = nodes.CLIPTextEncode().encode(clip, text + " a dog")[0]
    length = json.loads((pack.nodes.tiny_base.FOLDER / "config.json").read_text())["length"]
    assert short[0][0].shape[1] == length
    assert long[0][0].shape[1] >= 4 * length and long[0][0].shape[1] % length == 0
    assert not torch.equal(long[0][0], changed[0][0])  # the last words count too
    assert drawn(loaded, text).std() > 0.05


def test_words_it_never_saw_are_read_in_parts(loaded):
    clip = loaded[0][1]
    tokens = [token for token, _ in clip.tokenize("zyxwvq Ünïcødé 🚀 ")["l"][0]]
    end = max(tokens)
    assert tokens[0] == end - 1 and 2 < tokens.index(end) and all(0 <= token <= end for token in tokens)
    with torch.inference_mode():
        assert torch.isfinite(encoded(clip, "zyxwvq Ünïcødé 🚀 ")[0][0]).all()


def test_the_autoencoder_reconstructs_an_image(loaded):
    vae = loaded[0][2]
    image = torch.ones(1, 128, 128, 3)
    image[:, 32:96, 32:96] = torch.tensor([0.9, 0.2, 0.1])
    with torch.inference_mode():
        latent = vae.encode(image)
        back = vae.decode(latent)
    assert latent.shape == (1, 16, 16, 16)
    assert (back - image).square().mean() < 0.003  # 25 dB


def test_a_second_copy_is_made_as_the_first(loaded, pack):
    """The host makes one of its own where a patcher must not be dynamic."""
    model = loaded[0][0]
    maker, settings = model.cached_patcher_init
    copy = maker(*settings, disable_dynamic=True)
    assert copy.model is not model.model and not copy.is_dynamic()
    assert copy.model.model_sampling.shift == model.model.model_sampling.shift == 1.0
    for name, weight in model.model.diffusion_model.state_dict().items():
        assert torch.equal(copy.model.diffusion_model.state_dict()[name], weight)


def test_a_missing_file_is_named(pack, monkeypatch, tmp_path):
    (tmp_path / "denoiser.safetensors").touch()
    monkeypatch.setattr(pack.nodes.tiny_base, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="text_encoder, autoencoder missing in assets/tiny_base"):
        pack.nodes.tiny_base.ACLoRATinyBase.execute()
