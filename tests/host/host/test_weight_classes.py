"""Weights of another pack's class in ComfyUI's own layers, as its dynamic loader leaves those of GGUF files."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import quantised
from tests.support.families import FAMILIES, build, pictures

META = torch.device("meta")


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


@pytest.mark.parametrize("tells", [True, False])
def test_a_layer_that_tells_the_values_of_its_weight_is_computed_with_its_branch(pack, tells):
    dense_weight = pack.aclora_core.lora.dense_weight.dense_weight
    linear = torch.nn.Linear(64, 32)
    with torch.inference_mode():
        layer = quantised.packed_linear(linear, tells)
    with pack.nodes.host.differentiable.differentiable_weights(layer):
        model = pack.nodes.host.model.HostModel(None, torch.device("cpu"), None, {})
        assert model.is_unpatched(layer) == tells
        if tells:
            with Watching():
                found = dense_weight(layer.weight, torch.bfloat16)
            assert type(found) is torch.Tensor and found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), linear.weight.detach(), rtol=0.05, atol=1e-2)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_tensors_of_a_few_numbers_are_made_once(pack):
    constants, numbers = pack.nodes.host.packed_weights._Constants, torch.tensor([-3, 1, 7], dtype=torch.int8)

    def made():
        shifts = torch.tensor([0, 4], device=torch.device("cpu"), dtype=torch.uint8)
        return shifts, torch.tensor([0, 2], device=torch.device("cpu"), dtype=torch.uint8), numbers.to(META)

    with constants():
        first = made()
    with constants():
        second = made()
    assert all(one is other for one, other in zip(first, second, strict=True)) and first[0].tolist() == [0, 4]
    assert first[1].tolist() == [0, 2] and first[2].device == META
    numbers[0] = 5
    with constants():
        assert made()[2] is not first[2]
    assert made()[0] is not first[0]
