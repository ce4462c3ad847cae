"""Training the text encoder in the real ComfyUI."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.host.training.test_previews import preview_settings
from tests.support import tiny_base as tiny
from tests.support.tiny_base import caption, trained, untouched

parts, model, interrupt = tiny.parts, tiny.model, tiny.interrupt
TEXT = "text_encoders."
LEARNING = {"text_learning": 1.0, "learning_rate": 5e-3, "steps": 4}


@pytest.fixture(scope="module")
def pictures(pack, parts):
    """Two latents and their captions, as the dataset node outputs them."""
    captions = ["a red diamond, mine style", "a (blue:1.3) ball " + "on a quiet white page " * 8]
    generator = torch.Generator().manual_seed(0)
    latents = [{"samples": torch.randn(1, 16, 16, 16, generator=generator)} for _ in captions]
    return latents, [pack.nodes.host.with_caption(caption(parts, text), text) for text in captions]


@pytest.fixture(scope="module")
def learned(pack, parts, pictures):
    """The outputs of a training, after a check that its inputs are unchanged."""
    before = {name: weight.clone() for name, weight in parts[1].cond_stage_model.state_dict().items()}
    with untouched(parts[0]):
        found = trained(pack, parts[0], *pictures, clip=parts[1], **LEARNING)
    after = parts[1].cond_stage_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for module in parts[1].cond_stage_model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    assert not parts[1].patcher.patches
    return found


def difference(one, other):
    return (one[0][0] - other[0][0]).abs().max().item()


def test_the_trained_layers_are_in_the_adapter_and_in_the_clip(parts, learned):
    _, lora_model, _, report, clip = learned
    text = {key for key in lora_model if key.startswith(TEXT)}
    layers = {key.removesuffix(".alpha") for key in text if key.endswith(".alpha")}
    assert len(layers) == len(clip.patcher.patches) > 3 and len(lora_model) > len(text)
    assert any("self_attn.q_proj" in layer for layer in layers) and any("mlp.fc1" in layer for layer in layers)
    assert all(lora_model[f"{layer}.lora_up.weight"].abs().max() > 0 for layer in layers if "fc1" in layer)
    assert layers < report.signal.keys()
    words = "a red diamond, mine style"
    assert difference(caption((None, clip), words), caption(parts, words)) > 0.01


def test_the_stock_loader_gives_the_same_clip_from_the_file(parts, model, learned, tmp_path, monkeypatch, caplog):
    import folder_paths
    from safetensors.torch import save_file

    import nodes

    save_file(learned[1], tmp_path / "mine.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        loaded, clip = nodes.LoraLoader().load_lora(model, parts[1], "mine.safetensors", 1.0, 1.0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(loaded.patches) + len(clip.patcher.patches) == len(learned[1]) // 3
    words = "a blue ball"
    assert difference(caption((None, clip), words), caption((None, learned[4]), words)) == 0


def test_training_encodes_captions_as_comfyui_does(pack, parts, pictures):
    latents, captions = pictures
    with pack.nodes.host.training_session(parts[0], latents, captions, parts[1]) as (frozen, images):
        for conditioning, text in zip(captions, frozen.text.captions, strict=True):
            now = frozen.text.encode(text)
            torch.testing.assert_close(now[0][0], conditioning[0][0].clone(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(now[0][1]["pooled_output"], conditioning[0][1]["pooled_output"].clone())
        for number in range(2):
            for name, cond in images.conditions[number].items():
                if isinstance(cond.cond, torch.Tensor):
                    now = images.conditioning([number])[name].cpu()
                    torch.testing.assert_close(now, cond.cond, rtol=1e-5, atol=1e-5)


def test_the_text_encoder_is_not_trained_without_its_node(pack, parts, pictures):
    _, lora_model, *_, clip = trained(pack, parts[0], *pictures)
    assert clip.message and not any(key.startswith(TEXT) for key in lora_model)


def test_text_learning_scales_the_learning_rate(pack, parts, pictures, learned):
    gentle = trained(pack, parts[0], *pictures, clip=parts[1], **LEARNING | {"text_learning": 0.1})
    words = "a red diamond, mine style"
    far, near = (difference(caption((None, found[4]), words), caption(parts, words)) for found in (learned, gentle))
    assert near < far / 3


def test_previews_use_the_current_text_encoder(pack, parts, pictures, monkeypatch):
    given = []
    real = pack.nodes.training.display.host.sample_previews
    monkeypatch.setattr(
        pack.nodes.training.display.host, "sample_previews", lambda *inputs: given.append(inputs[3]) or real(*inputs)
    )
    trained(pack, parts[0], *pictures, clip=parts[1], previews=preview_settings(pack, parts, "a ball"), **LEARNING)
    assert difference(given[0][0], given[-1][0]) > 1e-3


def test_a_cancel_while_encoding_captions_keeps_the_adapter(pack, parts, pictures, interrupt, monkeypatch):
    import comfy.model_management

    calls = []
    encoder = pack.nodes.host.text_encoder.TextEncoder
    real = encoder.encode

    def press_cancel(self, caption):
        calls.append(caption)
        if len(calls) == 9:
            interrupt()
        return real(self, caption)

    monkeypatch.setattr(encoder, "encode", press_cancel)
    with untouched(parts[0]):
        found = trained(pack, parts[0], *pictures, clip=parts[1], **LEARNING | {"steps": 40})
    assert 1 <= len(found[2]["loss"]) < 6 and any(name.startswith(TEXT) for name in found[1])
    assert not comfy.model_management.processing_interrupted()


def test_validation_uses_the_current_text_encoder(pack, parts, pictures):
    core = pack.aclora_core
    latents, captions = pictures
    config = core.config.train_config.TrainConfig(**{"max_rank": 2, "batch_size": 1} | LEARNING)
    with pack.nodes.host.training_session(parts[0], latents, captions, parts[1]) as (model, images):
        trainer = core.training.trainer.Trainer(model, images, config, [0], core.training.progress.Progress(1), 1)
        with trainer.ready():
            held = core.training.fixed_noise.FixedNoiseImages(model, images, [1], 0)
            kept = [tensor for batch in held._batches for tensor in core.storage.nested.tensors_in(batch)]
            assert kept and not any(tensor.requires_grad for tensor in kept)  # no graph stays in memory
            before = held.losses()
            assert torch.equal(before, held.losses())
            with torch.no_grad():
                for name, branch in trainer.adapted.parameters.layers.items():
                    if name.startswith(TEXT):
                        branch.lora_up.fill_(0.1)
            trainer.adapted.parameters.refresh()
            assert (held.losses() - before).abs().max() > 1e-4


@pytest.mark.parametrize("known", [True, False])
def test_an_untrainable_text_encoder_is_refused_before_the_training(pack, parts, pictures, known, monkeypatch):
    latents, captions = pictures
    if known:
        monkeypatch.setattr(pack.nodes.host.text_encoder.comfy.clip_model, "CLIPTextModel", torch.nn.Linear)
        sentence = "and only CLIP's own text models"
    else:
        captions = [[[cond, {"pooled_output": None}]] for ((cond, _),) in captions]
        sentence = "caption of image 1 is not"
    with pytest.raises(ValueError, match=sentence):
        trained(pack, parts[0], latents, captions, clip=parts[1], text_learning=1.0)


def test_text_learning_without_a_clip_is_refused(pack, parts, pictures):
    with pytest.raises(ValueError, match="there is none"):
        trained(pack, parts[0], *pictures, text_learning=1.0)
