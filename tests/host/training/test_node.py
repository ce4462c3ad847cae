"""Training in the real ComfyUI: its results, and what it must not change."""

import logging
import math

import pytest
import torch

from tests.support import tiny_base as tiny
from tests.support.tiny_base import (
    DENOISER,
    LONG,
    answer,
    caption,
    denoising_loss,
    first_step,
    noisy_pair,
    open_training,
    trained,
    untouched,
)

# Fixtures: the tiny base, two images, ComfyUI's Cancel.
parts, model, pictures = tiny.parts, tiny.model, tiny.pictures


def test_two_images_are_overfitted_and_sampled(pack, parts, model, pictures):
    latents, captions = pictures
    with untouched(model):
        result = trained(pack, model, latents, captions, steps=40, learning_rate=2e-3, max_rank=8)
    losses = result[2]["loss"]
    # The loss of a step varies with its noise level; the fixed noise below is the precise measure.
    assert len(losses) == 40 and sum(losses[-16:]) < 0.75 * sum(losses[:16])
    before, after = (denoising_loss(pack, m, latents, captions) for m in (model, result[0]))
    assert after < 0.5 * before


def test_the_outputs_are_accepted_by_comfyuis_nodes(pack, parts, model, pictures):
    changed, lora_model, loss_map, report, clip = trained(pack, model, *pictures)
    assert "only if AC-LoRA Text Encoder Options is connected" in clip.message
    assert type(changed) is type(model) and changed is not model and changed.model is model.model
    suffixes = {".".join(key.split(".")[-2:]) for key in lora_model if not key.endswith(".alpha")}
    assert suffixes == {"lora_up.weight", "lora_down.weight"} and all(key.startswith(DENOISER) for key in lora_model)
    assert not any(tensor.requires_grad for tensor in lora_model.values())
    assert loss_map == {"loss": report.losses} and all(map(math.isfinite, report.losses))
    assert report.facts.base_model == "SD3" and report.facts.resolution == "128x128"
    assert report.facts.images == 2 and set(report.signal) == {key[:-6] for key in lora_model if "alpha" in key}


def test_the_stock_loader_loads_the_adapter_without_a_warning(
    pack, parts, model, pictures, tmp_path, monkeypatch, caplog
):
    import folder_paths
    from safetensors.torch import save_file

    import nodes

    changed, lora_model, _, *_ = trained(pack, model, *pictures, layers="all", steps=6)
    save_file(lora_model, tmp_path / "mine.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        loaded, _ = nodes.LoraLoader().load_lora(model, parts[1], "mine.safetensors", 1.0, 1.0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(loaded.patches) == len(lora_model) // 3 == len(changed.patches)
    plain, ours, stock = (first_step(m, pictures[1][0]) for m in (model, changed, loaded))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    assert (ours - plain).abs().mean() > 0.01


def test_the_same_seed_gives_the_same_adapter(pack, model, pictures):
    first, again, other = (trained(pack, model, *pictures, seed=seed) for seed in (7, 7, 8))
    assert first[2] == again[2] != other[2]
    for key, tensor in first[1].items():
        assert torch.equal(tensor, again[1][key]), key
        if "lora_up" in key:
            assert not torch.equal(tensor, other[1][key]), key


def test_the_unconditional_is_used_where_a_setting_asks_for_it_and_only_there(pack, parts, model, pictures):
    empty = caption(parts, "")
    plain, ignored, dropped, held = (
        trained(pack, model, *pictures, steps=3, **more)
        for more in (
            {},
            {"unconditional": empty},
            {"unconditional": empty, "caption_dropout": 0.5},
            {"unconditional": empty, "prior_weight": 5.0},
        )
    )
    assert plain[2] == ignored[2] and plain[2] != dropped[2] and plain[2] != held[2]
    for key, tensor in plain[1].items():
        assert torch.equal(tensor, ignored[1][key]), key
    with pytest.raises(ValueError, match="to unconditional of AC-LoRA Learning Options"):
        trained(pack, model, *pictures, steps=3, prior_weight=1.0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1, 1]])
def test_every_image_keeps_its_caption_in_a_batch(pack, model, pictures, order):
    with torch.inference_mode(), open_training(pack, model, *pictures) as (frozen, images), torch.no_grad():
        noisy, sigma = noisy_pair(frozen, images)
        together = answer(frozen, images, noisy, sigma, order)
        alone = [answer(frozen, images, noisy[i : i + 1], sigma[i : i + 1], [order[i]]) for i in range(2)]
        swapped = answer(frozen, images, noisy, sigma, [1 - number for number in order])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (together - swapped).abs().amax((1, 2, 3)).min() > 0.01


def test_the_gradient_of_a_batch_is_the_mean_over_its_images(pack, model, pictures):
    core = pack.aclora_core
    with torch.inference_mode(), open_training(pack, model, *pictures) as (frozen, images):
        layers = core.lora.targets.preset_layers(frozen.network, "attention")
        weights = core.lora.parameters.make_parameters(
            layers, core.lora.LoraSpec(2, 2.0), torch.Generator().manual_seed(0), frozen.device
        )
        ups = [branch.up.compute.grad for branch in weights.layers.values()]
        noisy, sigma = noisy_pair(frozen, images)
        clean = torch.cat(images.latents)

        def gradient(numbers):
            rows = torch.tensor(numbers)
            denoised = answer(frozen, images, noisy[rows], sigma[rows], numbers)
            loss = core.diffusion.loss.prediction_loss(
                frozen.objective, sigma[rows], noisy[rows], clean[rows], denoised
            )
            weights.gradient.zero_()
            loss.mean().backward()
            return [up.clone() for up in ups]

        with core.lora.injection.injected(layers, weights.layers, frozen.is_unpatched):
            both, first, second = gradient([0, 1]), gradient([0]), gradient([1])
    assert sum(bool(part.any()) for part in both) > len(both) // 2
    for whole, one, two in zip(both, first, second, strict=True):
        torch.testing.assert_close(whole, (one + two) / 2, rtol=1e-3, atol=1e-6)


def test_training_and_sampler_give_the_same_output(pack, model, pictures):
    """The output for pure noise equals ComfyUI's KSampler, so conditioning and scaling are the same."""
    import comfy.sample

    latents, captions = pictures
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 16, 16), 3)
    with torch.inference_mode(), open_training(pack, model, latents, captions) as (frozen, images), torch.no_grad():
        found = frozen.base.process_latent_out(answer(frozen, images, noise, torch.ones(1), [1]))
    torch.testing.assert_close(found, first_step(model, captions[1]), rtol=1e-3, atol=1e-3)


def test_captions_of_different_lengths_are_trained_in_separate_batches(pack, parts, model, pictures):
    latents, captions = [*pictures[0], pictures[0][0]], [*pictures[1], caption(parts, LONG)]
    assert captions[2][0][0].shape[1] > captions[0][0][0].shape[1]
    with torch.inference_mode(), open_training(pack, model, latents, captions) as (frozen, images):
        assert images.batch_keys[0] == images.batch_keys[1] != images.batch_keys[2]
    report = trained(pack, model, latents, captions, steps=4)[3]
    assert report.facts.epochs == 2 and report.facts.images == 3


def test_images_of_different_sizes_are_trained_in_separate_batches(pack, model, pictures):
    wide = {"samples": torch.randn(1, 16, 12, 20, generator=torch.Generator().manual_seed(0))}
    latents, captions = [*pictures[0], wide], [*pictures[1], pictures[1][0]]
    result = trained(pack, model, latents, captions, steps=2)
    assert result[3].facts.resolution == "128x128" and all(map(math.isfinite, result[2]["loss"]))


def test_inputs_are_unchanged(pack, model, pictures):
    latents, captions = pictures
    before = [latent["samples"].clone() for latent in latents], [text[0][0].clone() for text in captions]
    keys = [set(text[0][1]) for text in captions]
    trained(pack, model, latents, captions)
    for latent, samples in zip(latents, before[0], strict=True):
        assert set(latent) == {"samples"} and torch.equal(latent["samples"], samples)
    for text, words, names in zip(captions, before[1], keys, strict=True):
        assert torch.equal(text[0][0], words) and set(text[0][1]) == names


def test_a_model_with_a_lora_and_a_patched_schedule_is_trained_with_both(pack, model, pictures):
    import comfy_extras.nodes_model_advanced as advanced

    shifted = advanced.ModelSamplingSD3().patch(model, 3.0)[0]
    styled = trained(pack, shifted, *pictures, learning_rate=5e-3)[0]
    shifted_too, _ = pack.nodes.host.apply_trained_lora(styled, None, {})
    seen = first_step(styled, pictures[1][0])  # ComfyUI patches the shared weights here
    with untouched(shifted_too):
        with torch.inference_mode(), open_training(pack, shifted_too, *pictures) as (frozen, images), torch.no_grad():
            assert frozen.objective.sigma_at(0.5) == pytest.approx(0.75)  # 3 t / (1 + 2 t)
            import comfy.sample

            noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 16, 16), 3)
            found = frozen.base.process_latent_out(answer(frozen, images, noise, torch.ones(1), [0]))
        torch.testing.assert_close(found, seen, rtol=1e-3, atol=1e-3)
        again = trained(pack, shifted_too, *pictures)
    assert len(again[0].patches) == len(styled.patches) and "model_sampling" in again[0].object_patches
    assert all(len(patches) == 2 for patches in again[0].patches.values())


def test_learning_options_reach_the_training(pack, model, pictures, caplog):
    settings = {
        "layers": "attention and feed-forward",
        "smallest": False,
        "optimizer": "Adafactor",
        "schedule": "cosine",
        "warm_up": 1,
        "accumulate": 2,
        "batch_size": 1,
        "ema_decay": 0.5,
        "timesteps": "shifted",
        "loss_weight": "min-SNR",
        "min_snr_gamma": 3.0,
        "include_layers": "attn.qkv\nmlp",
        "exclude_layers": "context",
        "layer_ranks": r"mlp\.fc[12]=2",
    }
    with caplog.at_level(logging.INFO), untouched(model):
        _, lora_model, loss_map, report, *_ = trained(pack, model, *pictures, **settings)
    assert "predicts the velocity of a flow; timesteps are drawn shifted, loss weights: min-SNR" in caplog.text
    assert len(loss_map["loss"]) == 3 and {name: report.settings[name] for name in settings} == settings
    ranks = {key.removesuffix(".lora_down.weight"): len(t) for key, t in lora_model.items() if "lora_down" in key}
    assert ranks and all(("attn.qkv" in name or "mlp" in name) and "context" not in name for name in ranks)
    assert {rank for name, rank in ranks.items() if "mlp" in name} == {2}
    assert {rank for name, rank in ranks.items() if "mlp" not in name} == {4}
