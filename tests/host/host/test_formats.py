"""Bases in every format that ComfyUI draws with are trained about as well as in float32, also with streamed weights."""

import pytest
import torch

from tests.support import quantised
from tests.support.tiny_base import parts, pictures, trained, untouched  # noqa: F401

STEPS = {"steps": 4, "batch_size": 2, "max_rank": 4, "layers": "all", "mode": "off", "smallest": False}


@pytest.fixture(scope="module")
def weights(pack):
    return quantised.tiny_denoiser(pack.nodes.tiny_base.FOLDER)


@pytest.fixture(scope="module")
def in_float32(pack, weights, pictures):  # noqa: F811
    """The losses and the adapter of a training with float32 weights."""
    return learned(pack, quantised.load(weights, None), pictures)


def learned(pack, model, given):
    latents, captions = given
    with untouched(model):
        outputs = trained(pack, model, latents, captions, **STEPS)
    return outputs[2]["loss"], outputs[1]


def alike(found, expected) -> float:
    """Return the cosine of two adapters' products, all layers together."""
    dots = torch.zeros(3, dtype=torch.float64)
    for name in [name for name in expected if name.endswith("lora_up.weight")]:
        down = name.replace("lora_up", "lora_down")
        if expected[name].ndim == 2:
            a, b = ((each[name].float() @ each[down].float()).double() for each in (found, expected))
            dots += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
    return float(dots[0] / (dots[1] * dots[2]).sqrt())


@pytest.fixture(params=["whole", "streamed"])
def loading(request, pack, monkeypatch) -> str:
    if request.param == "streamed":
        monkeypatch.setattr(pack.nodes.host.loading, "fits", lambda patcher, limits: False)
    return request.param


@pytest.mark.parametrize("name", quantised.FORMATS)
def test_a_base_in_a_quantised_format_learns_about_the_same(name, loading, pack, weights, pictures, in_float32):  # noqa: F811
    losses, adapter = learned(pack, quantised.load(weights, quantised.FORMATS[name]), pictures)
    assert losses == pytest.approx(in_float32[0], rel=0.4 if "4" in name else 0.15)
    assert alike(adapter, in_float32[1]) > 0.75


@pytest.mark.parametrize("tells", [True, False])
def test_a_base_with_weights_of_a_class_of_their_own_learns_about_the_same(
    loading,
    tells,
    pack,
    weights,
    pictures,  # noqa: F811
    in_float32,
):
    model = quantised.pack_blocks(quantised.load(weights, None, disable_dynamic=True), tells)
    losses, adapter = learned(pack, model, pictures)
    assert losses == pytest.approx(in_float32[0], rel=0.1)
    assert alike(adapter, in_float32[1]) > 0.9
    kinds = {type(weight) for weight in model.model.diffusion_model.parameters()}
    assert quantised.PackedWeight in kinds


@pytest.mark.parametrize("in_file", [torch.float16, torch.float64])
def test_a_streamed_base_gets_the_type_that_its_network_is_made_for(in_file, monkeypatch, pack, weights, pictures):  # noqa: F811
    """ComfyUI keeps linear layers as they are in the file where its dynamic loader runs, here only presumably."""
    import comfy.memory_management
    import comfy.sd

    def load(in_file, disable_dynamic=False):
        file = {name: weight.to(in_file) for name, weight in weights.items()}
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model_state_dict(file, {"dtype": torch.float32})
        model.cached_patcher_init = (load, (in_file,))
        model.model.model_sampling.set_parameters(shift=1.0)
        return model

    expected = learned(pack, load(in_file), pictures)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    model = load(in_file)
    assert in_file in {weight.dtype for weight in model.model.diffusion_model.parameters()}
    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    with pack.nodes.host.training_session(model, *pictures) as (frozen, _):
        assert {weight.dtype for weight in frozen.network.parameters()} == {torch.float32}
        assert frozen.patcher.model_size() >= sum(weight.nbytes for weight in frozen.network.parameters())
        assert frozen.patcher.model_size() < 1.2 * sum(weight.nbytes for weight in frozen.network.parameters())
    found = learned(pack, model, pictures)
    assert found[0] == expected[0]
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())
