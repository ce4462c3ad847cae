"""Models that cannot be trained on captioned images, and models with other conditioning than text."""

import importlib

import pytest
import torch

from tests.support import family_sizes as sizes
from tests.support.families import FAMILIES, MASK, Family, build, pictures
from tests.support.train_node import train

LEARNING = {
    "steps": 2,
    "batch_size": 2,
    "max_rank": 4,
    "alpha": 4.0,
    "learning_rate": 1e-3,
    "layers": "all",
    "mode": "off",
}
WAN_I2V = sizes.WAN | {"model_type": "i2v", "out_dim": 16}
OVERWRITES = "overwrites values"
FOLLOWS = "follows another image"
# Models that are recognised by their network, or by how ComfyUI's code uses it.
REFUSED = {
    "LTX-Video": (Family("LTXV", sizes.LTXV, (128, 1, 4, 4), extras=MASK), OVERWRITES),
    "PixelDiT": (Family("PixelDiTT2I", sizes.PIXELDIT, (3, 32, 32), extras=MASK), OVERWRITES),
    "Stable Cascade B": (Family("Stable_Cascade_B", sizes.CASCADE_B, (4, 8, 8), pooled=16), "stage B"),
    "Hunyuan Image 2.1 distilled": (
        Family("HunyuanImage21", sizes.HUNYUAN_IMAGE | {"meanflow": True}, (64, 4, 4)),
        "few steps",
    ),
    "Flux.1 Depth": (Family("Flux", sizes.FLUX_1 | {"in_channels": 32}, (16, 8, 8), pooled=16), FOLLOWS),
    "Wan 2.1 I2V": (Family("WAN21_I2V", WAN_I2V | {"in_dim": 36}, (16, 1, 8, 8)), FOLLOWS),
    "Wan 2.1 Fun Control": (Family("WAN21_FunControl2V", WAN_I2V | {"in_dim": 48}, (16, 1, 8, 8)), FOLLOWS),
    "Wan 2.2 I2V": (Family("WAN21_T2V", sizes.WAN | {"in_dim": 36, "out_dim": 16}, (16, 1, 8, 8)), FOLLOWS),
    "Hunyuan Video I2V": (
        Family("HunyuanVideoI2V", sizes.HUNYUAN_VIDEO | {"in_channels": 33}, (16, 1, 8, 8), pooled=16),
        FOLLOWS,
    ),
    "SkyReels I2V": (
        Family("HunyuanVideoSkyreelsI2V", sizes.HUNYUAN_VIDEO | {"in_channels": 32}, (16, 1, 8, 8), pooled=16),
        FOLLOWS,
    ),
    "Cosmos 1 I2V": (Family("CosmosI2V", sizes.COSMOS_1 | {"in_channels": 17}, (16, 1, 8, 8)), FOLLOWS),
    "Cosmos Predict 2 I2V": (
        Family(
            "CosmosI2VPredict2", sizes.COSMOS | {"image_model": "cosmos_predict2", "in_channels": 17}, (16, 1, 8, 8)
        ),
        FOLLOWS,
    ),
    "CogVideoX I2V": (Family("CogVideoX_I2V", sizes.COGVIDEO | {"in_channels": 32}, (16, 1, 8, 8)), FOLLOWS),
    "CogVideoX inpainting": (Family("CogVideoX_Inpaint", sizes.COGVIDEO | {"in_channels": 48}, (16, 1, 8, 8)), FOLLOWS),
}


@pytest.fixture
def families(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.families")


@pytest.mark.parametrize("name", REFUSED)
def test_an_untrainable_model_is_refused_with_a_message(pack, name):
    family, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{sentence}.* (Connect|Train) "):
        train(pack, build(family), *pictures(family), LEARNING)


@pytest.mark.parametrize("name", [name for name, (_, sentence) in REFUSED.items() if sentence == OVERWRITES])
def test_comfyuis_code_overwrites_a_tensor_that_the_backward_pass_needs(pack, families, monkeypatch, name):
    family, _ = REFUSED[name]
    monkeypatch.setattr(families, "_REFUSED", {})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(pack, build(family), *pictures(family), LEARNING)


def test_every_named_class_exists_in_comfyui(families):
    import comfy.model_base

    for name in (*families._REFUSED, *families._NOTES, *families._TEXT_LIKE_OTHERS):
        assert issubclass(getattr(comfy.model_base, name), (comfy.model_base.BaseModel, comfy.model_base.IP2P)), name


def test_a_foreign_network_needs_no_channel_attribute(pack, families):
    model = build(FAMILIES["Flux.1"])

    class Own(type(model.model)):
        def concat_cond(self, **given):
            raise KeyError("a sound")

    model.model.__class__ = Own
    families.check_family(model.model)
    assert families.training_note(model) is None


NOTES = {
    "SDXL": None,
    "SD1.5 inpainting": "fill in",
    "SDXL inpainting": "fill in",
    "Flux.1 Fill": "fill in",
    "SDXL InstructPix2Pix": "edit another image by instruction",
    "SD2.1 unCLIP": "an image beside the text",
    "Hunyuan Video 1.5": None,
    "Kandinsky 5": None,
}
MORE = {
    "SD1.5 inpainting": Family("SD15", sizes.SD15 | {"in_channels": 9}, (4, 8, 8)),
    "SD2.1 unCLIP": Family("SD21UnclipL", sizes.UNCLIP, (4, 8, 8)),
}


@pytest.mark.parametrize("name, words", NOTES.items(), ids=NOTES)
def test_a_model_with_other_conditioning_gets_a_note(pack, families, name, words):
    family = {**FAMILIES, **MORE}[name]
    note = families.training_note(build(family))
    assert note is None if words is None else words in note


def test_the_note_is_in_the_log_and_in_the_summary(pack, caplog):
    family = FAMILIES["SDXL InstructPix2Pix"]
    with caplog.at_level("INFO", logger="aclora"):
        report = train(pack, build(family), *pictures(family), LEARNING)[3]
    assert caplog.text.count(NOTES["SDXL InstructPix2Pix"]) == 1
    assert NOTES["SDXL InstructPix2Pix"] in pack.nodes.training.status.training_summary(report)


@pytest.mark.parametrize("name", ["SD1.5 inpainting", "Flux.1 Fill"])
def test_an_inpainting_model_gets_an_empty_image_and_a_full_mask(pack, name):
    family = {**FAMILIES, **MORE}[name]
    with pack.nodes.host.training_session(build(family), *pictures(family)) as (frozen, images):
        given = images.conditions[0]["c_concat"].cond
    channels = family.latent[0]
    mask, picture = (given[:, :1], given[:, 1:]) if channels == 4 else (given[:, channels:], given[:, :channels])
    assert picture.shape[1] == channels and torch.equal(mask, torch.ones_like(mask))
    assert picture.flatten(2).std(-1).max() < 1e-6  # of one colour


def test_hidream_o1_keeps_no_cache_between_steps(pack):
    family = FAMILIES["HiDream-O1"]
    model = build(family)
    options = {"patches_replace": {"dit": {("double_block", 7): None}, "other": {}}}
    model.model_options["transformer_options"] = options
    train(pack, model, *pictures(family), LEARNING)
    assert model.model.diffusion_model._kv_cache_entries == []
    assert options == {"patches_replace": {"dit": {("double_block", 7): None}, "other": {}}}
