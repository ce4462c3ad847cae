"""Training in the real ComfyUI: what it learns, what it leaves as it was, and how it says that something is wrong."""

import contextlib
import importlib
import logging
import math

import pytest
import torch

from .training import train

SHORT, LONG = "a red diamond, mine style", "a blue ball " + "on a quiet white page " * 8
QUICK = {"steps": 3, "batch_size": 2, "max_rank": 4, "learning_rate": 1e-3}
DENOISER = "diffusion_model."


@pytest.fixture(scope="module")
def parts(pack):
    """The tiny base's MODEL, CLIP and VAE, made under inference mode as the host runs nodes."""
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
    """Two latents, of a diamond and of a ball, and their captions; made under inference mode too."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    drawn = torch.ones(2, 128, 128, 3)
    drawn[0][x.abs() + y.abs() < 0.7] = torch.tensor([0.9, 0.1, 0.1])
    drawn[1][x.square() + y.square() < 0.5] = torch.tensor([0.1, 0.2, 0.9])
    with torch.inference_mode():
        latents = [{"samples": parts[2].encode(picture[None])} for picture in drawn]
    return latents, [caption(parts, SHORT), caption(parts, "a blue ball, mine style")]


def trained(pack, model, latents, conditioning, previews=None, clip=None, **settings):
    """The node's outputs."""
    return train(pack, model, latents, conditioning, QUICK | settings, previews=previews, clip=clip)


def first_step(model, conditioning, seed=3):
    """What the model takes for the picture in pure noise: one step of the host's KSampler without guidance."""
    import nodes

    channels = model.model.latent_format.latent_channels
    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, channels, 16, 16)}
        drawn = nodes.common_ksampler(model, seed, 1, 1.0, "euler", "simple", conditioning, conditioning, empty)
    return drawn[0]["samples"]


def state_of(model):
    """What training must leave alone in a MODEL, seen while this MODEL's own patches are on the weights."""
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
    """Fails where the block changes the MODEL, or what the host has set for all models."""
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
    """Shows every progress to the hook, as the host's server does."""
    import comfy.utils

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **other: hook(value, total, preview))
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_global_hook(before)


@pytest.fixture
def interrupt():
    """The host's Cancel; taken back when the test ends."""
    import comfy.model_management

    yield lambda: comfy.model_management.interrupt_current_processing(True)
    comfy.model_management.interrupt_current_processing(False)


def test_an_overfit_of_two_pictures_is_learned_and_drawn(pack, parts, model, pictures):
    latents, captions = pictures
    with untouched(model):
        result = trained(pack, model, latents, captions, steps=40, learning_rate=2e-3, max_rank=8)
    losses = result[2]["loss"]
    # Single steps vary with the noise level that they drew; the fixed noise below is the sharp measure.
    assert len(losses) == 40 and sum(losses[-16:]) < 0.75 * sum(losses[:16])
    before, after = (denoising_loss(pack, m, latents, captions) for m in (model, result[0]))
    assert after < 0.5 * before


def test_the_outputs_are_what_the_hosts_nodes_take(pack, parts, model, pictures):
    changed, lora_model, loss_map, report, clip = trained(pack, model, *pictures)
    assert clip is None
    assert type(changed) is type(model) and changed is not model and changed.model is model.model
    suffixes = {".".join(key.split(".")[-2:]) for key in lora_model if not key.endswith(".alpha")}
    assert suffixes == {"lora_up.weight", "lora_down.weight"} and all(key.startswith(DENOISER) for key in lora_model)
    assert not any(tensor.requires_grad for tensor in lora_model.values())
    assert loss_map == {"loss": report.losses} and all(map(math.isfinite, report.losses))
    assert report.settings["base_model"] == "SD3" and report.settings["resolution"] == "128x128"
    assert report.settings["images"] == 2 and set(report.signal) == {key[:-6] for key in lora_model if "alpha" in key}


def test_the_adapter_goes_through_the_stock_loader_without_a_warning(
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


def open_training(pack, model, latents, conditioning):
    return pack.nodes.host.training(model, latents, conditioning)


def denoising_loss(pack, model, latents, captions):
    """At fixed noise and noise levels, of the model with the patches that it has."""
    with torch.inference_mode(), open_training(pack, model, latents, captions) as trainable:
        validation = importlib.import_module(f"{pack.__name__}.aclora_core.validation")
        return validation.denoising_loss(trainable, range(len(latents)), 5)


def answer(trainable, noisy, sigma, numbers):
    """What the model takes for the pictures without noise, each with its own caption."""
    return trainable.denoise(noisy, sigma, trainable.condition(numbers))


def noisy_pair(trainable):
    noise = torch.randn(2, *trainable.latents[0].shape[1:], generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.4, 0.9])
    return trainable.objective.add_noise(sigma, noise, torch.cat(trainable.latents[:2])), sigma


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1, 1]])
def test_every_picture_keeps_its_own_caption_in_a_batch(pack, model, pictures, order):
    with torch.inference_mode(), open_training(pack, model, *pictures) as trainable, torch.no_grad():
        noisy, sigma = noisy_pair(trainable)
        together = answer(trainable, noisy, sigma, order)
        alone = [answer(trainable, noisy[i : i + 1], sigma[i : i + 1], [order[i]]) for i in range(2)]
        swapped = answer(trainable, noisy, sigma, [1 - number for number in order])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (together - swapped).abs().amax((1, 2, 3)).min() > 0.01


def test_the_gradient_of_a_batch_is_the_mean_of_its_pictures(pack, model, pictures):
    core = pack.aclora_core
    with torch.inference_mode(), open_training(pack, model, *pictures) as trainable:
        layers = core.lora.find_layers(trainable.network, "attention")
        weights = core.lora.make_weights(layers, 2, 2.0, torch.Generator().manual_seed(0), trainable.device)
        ups = [branch.up.leaf.grad for branch in weights.branches.values()]
        noisy, sigma = noisy_pair(trainable)
        clean = torch.cat(trainable.latents)

        def gradient(numbers):
            rows = torch.tensor(numbers)
            denoised = answer(trainable, noisy[rows], sigma[rows], numbers)
            loss = core.objective.prediction_loss(trainable.objective, sigma[rows], noisy[rows], clean[rows], denoised)
            weights.gradient.zero_()
            loss.mean().backward()
            return [up.clone() for up in ups]

        with core.lora.attached(layers, weights.branches, trainable.is_plain):
            both, first, second = gradient([0, 1]), gradient([0]), gradient([1])
    assert sum(bool(part.any()) for part in both) > len(both) // 2
    for whole, one, two in zip(both, first, second, strict=True):
        torch.testing.assert_close(whole, (one + two) / 2, rtol=1e-3, atol=1e-6)


def test_what_training_sees_is_what_the_sampler_sees(pack, model, pictures):
    """The answer to pure noise is that of the host's own KSampler, so conditioning and scaling are the host's."""
    import comfy.sample

    latents, captions = pictures
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 16, 16), 3)
    with torch.inference_mode(), open_training(pack, model, latents, captions) as trainable, torch.no_grad():
        found = trainable.base.process_latent_out(answer(trainable, noise, torch.ones(1), [1]))
    torch.testing.assert_close(found, first_step(model, captions[1]), rtol=1e-3, atol=1e-3)


def test_captions_of_different_lengths_are_trained_but_not_joined(pack, parts, model, pictures):
    latents, captions = [*pictures[0], pictures[0][0]], [*pictures[1], caption(parts, LONG)]
    assert captions[2][0][0].shape[1] > captions[0][0][0].shape[1]
    with torch.inference_mode(), open_training(pack, model, latents, captions) as trainable:
        assert trainable.groups[0] == trainable.groups[1] != trainable.groups[2]
    report = trained(pack, model, latents, captions, steps=4)[3]
    assert report.settings["epochs"] == 2 and report.settings["images"] == 3


def test_pictures_of_different_sizes_are_trained_but_not_joined(pack, model, pictures):
    wide = {"samples": torch.randn(1, 16, 12, 20, generator=torch.Generator().manual_seed(0))}
    latents, captions = [*pictures[0], wide], [*pictures[1], pictures[1][0]]
    result = trained(pack, model, latents, captions, steps=2)
    assert result[3].settings["resolution"] == "128x128" and all(map(math.isfinite, result[2]["loss"]))


def test_inputs_are_not_changed(pack, model, pictures):
    latents, captions = pictures
    before = [latent["samples"].clone() for latent in latents], [text[0][0].clone() for text in captions]
    keys = [set(text[0][1]) for text in captions]
    trained(pack, model, latents, captions)
    for latent, samples in zip(latents, before[0], strict=True):
        assert set(latent) == {"samples"} and torch.equal(latent["samples"], samples)
    for text, words, names in zip(captions, before[1], keys, strict=True):
        assert torch.equal(text[0][0], words) and set(text[0][1]) == names


def test_a_model_with_a_lora_and_a_patched_schedule_is_trained_as_it_is(pack, model, pictures):
    import comfy_extras.nodes_model_advanced as advanced

    shifted = advanced.ModelSamplingSD3().patch(model, 3.0)[0]
    styled = trained(pack, shifted, *pictures, learning_rate=5e-3)[0]
    shifted_too, _ = pack.nodes.host.with_adapter(styled, None, {})
    seen = first_step(styled, pictures[1][0])  # the host puts patches onto the shared weights here
    with untouched(shifted_too):
        with torch.inference_mode(), open_training(pack, shifted_too, *pictures) as trainable, torch.no_grad():
            assert trainable.objective.sigma_at(0.5) == pytest.approx(0.75)  # 3 t / (1 + 2 t)
            import comfy.sample

            noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 16, 16), 3)
            found = trainable.base.process_latent_out(answer(trainable, noise, torch.ones(1), [0]))
        torch.testing.assert_close(found, seen, rtol=1e-3, atol=1e-3)
        again = trained(pack, shifted_too, *pictures)
    assert len(again[0].patches) == len(styled.patches) and "model_sampling" in again[0].object_patches
    assert all(len(patches) == 2 for patches in again[0].patches.values())


def test_an_error_while_training_leaves_the_model_as_it_was(pack, model, pictures):
    def fail(value, total, preview):
        raise RuntimeError("the browser went away")

    with untouched(model), progress(fail), pytest.raises(RuntimeError, match="the browser went away"):
        trained(pack, model, *pictures)


def test_a_loss_that_is_no_number_ends_with_a_sentence_and_leaves_the_model(pack, model, pictures):
    broken = model.clone()
    spoiled = {"samples": torch.full((1, 16, 16, 16), 1e38)}
    with untouched(model), pytest.raises(FloatingPointError, match="10 steps, up to step 10"):
        trained(pack, broken, [spoiled, spoiled], pictures[1], steps=20)


def test_progress_comes_with_every_step_and_a_picture_now_and_then(pack, model, pictures):
    seen = []
    with progress(lambda value, total, preview: seen.append((value, total, preview))):
        trained(pack, model, *pictures)
    assert seen[0][:2] == (1, 3) and seen[-1][:2] == (3, 3)
    assert seen[0][2][0] == "JPEG" and seen[-1][2][1].width > 100


def test_a_cancel_before_the_first_step_gives_one_step_and_is_taken_as_done(pack, model, pictures, interrupt):
    import comfy.model_management

    def refuse(value, total, preview):  # as the host's own hook does
        comfy.model_management.throw_exception_if_processing_interrupted()

    with untouched(model), progress(refuse):
        interrupt()
        _, lora_model, loss_map, report, *_ = trained(pack, model, *pictures)
    assert len(loss_map["loss"]) == len(report.losses) == 1
    assert any(tensor.any() for key, tensor in lora_model.items() if "lora_up" in key)
    assert not comfy.model_management.processing_interrupted()


def test_a_cancel_in_the_middle_of_a_step_ends_the_step_and_keeps_it(pack, model, pictures, interrupt, monkeypatch):
    """The host asks in every layer and would throw everything away."""
    import comfy.model_management

    calls = []
    final = model.model.diffusion_model.final_layer
    forward = final.forward

    def press_cancel(*inputs, **named):
        calls.append(1)
        if len(calls) == 3:
            interrupt()
        return forward(*inputs, **named)

    with untouched(model):
        monkeypatch.setattr(final, "forward", press_cancel)
        _, lora_model, loss_map, *_ = trained(pack, model, *pictures, steps=40)
        monkeypatch.undo()
    assert len(loss_map["loss"]) == 2 and len(calls) == 4 and all(map(math.isfinite, loss_map["loss"]))
    assert not comfy.model_management.processing_interrupted()
    whole = trained(pack, model, *pictures, steps=2)
    assert whole[2] == loss_map
    for key, tensor in lora_model.items():
        assert torch.equal(tensor, whole[1][key]), key


def test_a_cancel_on_the_way_keeps_what_was_learned(pack, model, pictures, interrupt, caplog):
    import comfy.model_management

    steps = []

    def press_cancel(value, total, preview):
        comfy.model_management.throw_exception_if_processing_interrupted()
        steps.append(value)
        if value >= 2:
            interrupt()

    with untouched(model), progress(press_cancel), caplog.at_level(logging.INFO, logger="aclora"):
        changed, _, loss_map, *_ = trained(pack, model, *pictures, steps=40)
    assert len(loss_map["loss"]) == steps[-1] < 40 and f"stopped at step {steps[-1]} of 40" in caplog.text
    assert not comfy.model_management.processing_interrupted()
    assert (first_step(changed, pictures[1][0]) - first_step(model, pictures[1][0])).abs().max() > 0


def replaced(latents, samples):
    return [{"samples": samples}, *latents[1:]]


BAD = {
    "more latents than captions": (lambda m, x, c: (m, x, c[:1]), {}, "2 latents but 1 conditionings"),
    "no pictures": (lambda m, x, c: (m, [], []), {}, "no pictures to learn from"),
    "wrong channels": (
        lambda m, x, c: (m, replaced(x, torch.zeros(1, 4, 16, 16)), c), {}, r"Latent 1 .*\(1, 4, 16, 16\).*16 channels"
    ),
    "a video": (lambda m, x, c: (m, replaced(x, torch.zeros(1, 16, 2, 16, 16)), c), {}, r"Latent 1 has the shape"),
    "many pictures in one latent": (
        lambda m, x, c: (m, replaced(x, torch.zeros(3, 16, 16, 16)), c), {}, "Latent 1 holds 3 pictures"
    ),
    "NaN": (lambda m, x, c: (m, replaced(x, torch.full((1, 16, 16, 16), torch.nan)), c), {}, "Latent 1 holds NaN"),
    "no model": (lambda m, x, c: (None, x, c), {}, "no diffusion model"),
    "a combined caption": (lambda m, x, c: (m, x, [c[0] + c[1], c[1]]), {}, "Caption 1 is made of 2 conditionings"),
    "rank too high": (lambda m, x, c: (m, x, c), {"max_rank": 321}, "largest layer can only have rank 320"),
    "a setting out of range": (lambda m, x, c: (m, x, c), {"learning_rate": math.inf}, "learning_rate must be above 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_a_sentence_and_leaves_the_model(pack, model, pictures, what):
    change, settings, sentence = BAD[what]
    with untouched(model), pytest.raises(ValueError, match=sentence):
        trained(pack, *change(model, *pictures), **settings)


@pytest.fixture
def unet(pack):
    """A random UNet of SD1.5's shape, made narrow, with the host's classes; predicts ε."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    shape = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1, "context_dim": 24, "num_heads": 4, "num_head_channels": -1,
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False, "use_checkpoint": False,
        "adm_in_channels": None, "use_temporal_attention": False, "dtype": torch.float32,
    }  # fmt: skip
    with torch.inference_mode():
        base = comfy.model_base.BaseModel(comfy.supported_models.SD15(shape), comfy.model_base.ModelType.EPS, "cpu")
        generator = torch.Generator().manual_seed(0)
        for name, weight in base.diffusion_model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            else:
                weight.fill_(name.endswith("weight"))  # norms
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def unet_pictures():
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        latents = [{"samples": torch.randn(1, 4, 16, 16, generator=generator) * 3} for _ in range(2)]
        return latents, [[[torch.randn(1, 77, 24, generator=generator), {}]] for _ in range(2)]


def test_a_unet_is_trained_with_its_convolutions(pack, unet, caplog):
    latents, captions = unet_pictures()
    with untouched(unet), caplog.at_level(logging.WARNING):
        settings = {"layers": "all", "steps": 10, "learning_rate": 5e-3, "restart_every": 4}
        changed, lora_model, loss_map, report, *_ = trained(pack, unet, latents, captions, **settings)
    assert not caplog.records
    losses = loss_map["loss"]
    assert len(report.restarts) == 1 and sum(losses[-3:]) < sum(losses[:3])
    kernel = lora_model[f"{DENOISER}input_blocks.2.0.op.lora_down.weight"]
    assert kernel.shape == (4, 32, 3, 3) and len(changed.patches) == len(lora_model) // 3


def test_the_saved_adapter_is_what_was_trained(pack, unet):
    """Branches beside the layers and the host's patched weights give the same answer, convolutions and strides too."""
    core = pack.aclora_core
    latents, captions = unet_pictures()
    changed, lora_model, _, *_ = trained(pack, unet, latents, captions, layers="all", learning_rate=1e-2)
    layers = core.adapter_file.from_state_dict(lora_model).layers
    branches = core.adapter_weights.AdapterWeights(layers, torch.device("cpu")).branches
    answers = []
    for chosen, beside in ((unet, branches), (changed, {}), (unet, {})):
        with torch.inference_mode(), open_training(pack, chosen, latents, captions) as trainable, torch.no_grad():
            noisy, sigma = noisy_pair(trainable)
            modules = core.lora.find_layers(trainable.network, "all", trainable.prefix)
            with core.lora.attached(modules, beside):
                answers.append(answer(trainable, noisy, sigma, [0, 1]))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-4)
    assert (answers[0] - answers[2]).abs().max() > 0.01


def test_a_unets_noise_is_its_own(pack, unet):
    """ε-prediction: the target variance is 1, and the noise levels are those of the host's schedule."""
    core = pack.aclora_core
    with torch.inference_mode(), open_training(pack, unet, *unet_pictures()) as trainable:
        assert trainable.objective.sampling == "uniform"
        variance = core.objective.target_variance(trainable.objective, trainable.latents * 8, 0)
        assert variance == pytest.approx(1, abs=0.03)
        sigmas = core.objective.draw_sigmas(trainable.objective, 500, torch.Generator().manual_seed(0))
        sampling = trainable.base.model_sampling
        assert sampling.sigma_min <= sigmas.min() < 0.1 and 10 < sigmas.max() <= sampling.sigma_max


def test_a_quantised_model_is_trained(pack, parts, pictures):
    """Eight-bit weights with a scale, as the host loads them, never read by the adapter."""
    import json

    import comfy.sd
    from comfy.quant_ops import QuantizedTensor
    from safetensors.torch import load_file

    weights = load_file(pack.nodes.tiny_base.FOLDER / "denoiser.safetensors")
    layers = {}
    for key in [key for key in weights if key.endswith(("qkv.weight", "fc1.weight"))]:
        name, scale = key.removesuffix(".weight"), weights[key].float().abs().max() / 448
        weights[key] = (weights[key].float() / scale).to(torch.float8_e4m3fn)
        weights[f"{name}.weight_scale"] = scale
        layers[name] = {"format": "float8_e4m3fn"}
    with torch.inference_mode():
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        model = comfy.sd.load_diffusion_model_state_dict(weights, metadata=metadata)
    qkv = model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv
    assert isinstance(qkv.weight, QuantizedTensor)
    before = qkv.weight.dequantize().clone()
    changed, lora_model, loss_map, *_ = trained(pack, model, *pictures, steps=16, learning_rate=2e-3)
    assert lora_model[f"{DENOISER}joint_blocks.0.x_block.attn.qkv.lora_up.weight"].any()
    losses = loss_map["loss"]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]) and denoising_loss(pack, changed, *pictures) < sum(losses[:4]) / 4
    first_step(model, pictures[1][0])  # takes the patches of the changed copy off again
    assert isinstance(qkv.weight, QuantizedTensor) and torch.equal(qkv.weight.dequantize(), before)
    assert not qkv._forward_hooks


def test_settings_of_learning_reach_the_training(pack, model, pictures, caplog):
    settings = {
        "optimizer": "Adafactor", "schedule": "cosine", "warm_up": 1, "accumulate": 2, "batch_size": 1,
        "ema_decay": 0.5, "timesteps": "shifted", "loss_weight": "min-SNR", "min_snr_gamma": 3.0,
        "include_layers": "attn.qkv\nmlp", "exclude_layers": "context", "layer_ranks": r"mlp\.fc[12]=2",
    }  # fmt: skip
    with caplog.at_level(logging.INFO), untouched(model):
        _, lora_model, loss_map, report, *_ = trained(pack, model, *pictures, **settings)
    assert "predicts the velocity of a flow; timesteps are drawn shifted, loss weights: min-SNR" in caplog.text
    assert len(loss_map["loss"]) == 3 and {name: report.settings[name] for name in settings} == settings
    ranks = {key.removesuffix(".lora_down.weight"): len(t) for key, t in lora_model.items() if "lora_down" in key}
    assert ranks and all(("attn.qkv" in name or "mlp" in name) and "context" not in name for name in ranks)
    assert {rank for name, rank in ranks.items() if "mlp" in name} == {2}
    assert {rank for name, rank in ranks.items() if "mlp" not in name} == {4}


def test_the_learning_rate_is_shown_where_it_is_not_what_was_set(pack):
    made = pack.nodes.train
    bar = pack.nodes.host.Bar(10)
    steady, falling = (made.Progress(10, 1, losses=[0.5], learning_rate=rate) for rate in (5e-4, 1.234e-4))
    assert "learning rate" not in made._line(steady, bar, 5e-4)
    assert "learning rate 0.00012" in made._line(falling, bar, 5e-4)


def test_the_expected_memory_and_the_latest_note_stand_below_the_loss(pack):
    progress = pack.nodes.train.Progress(10, 1, losses=[0.5], memory="3 GB of 8", notes=["older", "newer"])
    first, *others = pack.nodes.train._line(progress, pack.nodes.host.Bar(10), 5e-4).split("\n")
    assert first.startswith("training, loss 0.500") and others == ["3 GB of 8", "newer"]


def test_a_model_in_float16_is_trained(pack, parts, pictures):
    """Its gradients are scaled; no step is lost to that."""
    import comfy.sd
    from safetensors.torch import load_file

    weights = load_file(pack.nodes.tiny_base.FOLDER / "denoiser.safetensors")
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float16})
    if model.model.get_dtype_inference() != torch.float16:
        model.model.manual_cast_dtype = torch.float16
    assert model.model.get_dtype_inference() == torch.float16
    losses = trained(pack, model, *pictures, steps=16, learning_rate=2e-3)[2]["loss"]
    assert all(map(math.isfinite, losses)) and sum(losses[-4:]) < 0.8 * sum(losses[:4])
