"""Weights of another pack's class in ComfyUI's own layers, as its dynamic loader leaves those of GGUF files."""

import pytest
import torch

from tests.support.families import FAMILIES, build, pictures


class OwnClass(torch.Tensor):
    """Passes on to results, and neither detaches nor copies, like ComfyUI-GGUF's class."""

    def detach(self):
        return self

    def clone(self, *args, **kwargs):
        return self


class WithOperations(OwnClass):
    """Has operations of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def norms(model):
    """The norms of a Z-Image, by name."""
    network = model.model.diffusion_model
    return {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, torch.nn.RMSNorm) and part.weight is not None
    }


def with_norms_of(kind):
    """Return a Z-Image whose norms have weights of a class."""
    model = build(FAMILIES["Z-Image"])
    with torch.inference_mode():
        for norm in norms(model).values():
            norm.weight = torch.nn.Parameter(norm.weight.detach().as_subclass(kind), requires_grad=False)
    return model


@pytest.fixture
def session(pack):
    def opened(model):
        return pack.nodes.host.training_session(model, *pictures(FAMILIES["Z-Image"]))

    return opened


def test_activations_are_plain_tensors_that_can_be_detached(session):
    model = with_norms_of(OwnClass)
    kept = {name: norm.weight for name, norm in norms(model).items()}
    assert kept
    with torch.inference_mode(), session(model) as (frozen, images):
        classes = set()
        for block in frozen.network.layers:
            block.register_forward_hook(lambda block, given, output: classes.add(type(output)))
        frozen.denoise(images.latents[0], torch.tensor([0.5]), images.conditioning([0]))
        assert classes == {torch.Tensor}
    assert all(norm.weight is kept[name] for name, norm in norms(model).items())


def test_a_class_with_operations_of_its_own_is_kept(session):
    model = with_norms_of(WithOperations)
    with torch.inference_mode(), session(model):
        assert {type(norm.weight) for norm in norms(model).values()} == {WithOperations}
