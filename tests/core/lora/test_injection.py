"""LoRA branches: their outputs and gradients, injection and removal."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from aclora_core.lora.injection import injected
from aclora_core.lora.parameters import LoraLayer, LoraSpec, make_parameters
from aclora_core.lora.targets import preset_layers

CPU = torch.device("cpu")
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 5, bias=False), (2, 7, 6)),
    "linear on an image of tokens": (lambda: nn.Linear(6, 5), (2, 3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1)), (2, 4, 10, 9)),
    "conv2d with same padding": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False), (2, 4, 8, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 6)),
    "conv2d 1x1 without bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 4, 2, 6, 6)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_branches(layers: dict[str, nn.Module], rank: int, alpha: float) -> dict[str, LoraLayer]:
    return make_parameters(layers, LoraSpec(rank, alpha), seeded(), CPU).layers


def random_branches(layers: dict[str, nn.Module], rank: int, alpha: float) -> dict[str, LoraLayer]:
    """Branches whose lora_up is not zero, so that they add something."""
    weights = make_parameters(layers, LoraSpec(rank, alpha), seeded(), CPU)
    for branch in weights.layers.values():
        branch.lora_up.normal_(generator=seeded(9))
    weights.refresh()
    return weights.layers


def with_delta(layer: nn.Module, branch: LoraLayer) -> nn.Module:
    """A copy of the layer with the branch's delta added to its weight."""
    changed = copy.deepcopy(layer)
    weight = changed.get_parameter("weight")
    delta = branch.scale * branch.lora_up.flatten(1).double() @ branch.lora_down.flatten(1).double()
    with torch.no_grad():
        weight.add_(delta.reshape(weight.shape).float())
    return changed


@pytest.mark.parametrize("kind", LAYERS)
def test_a_branch_adds_the_output_of_its_delta_weight(kind: str) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    branches = random_branches({"layer": layer}, 3, 1.5)
    with torch.no_grad():
        without, expected = layer(x), with_delta(layer, branches["layer"])(x)
        with injected({"layer": layer}, branches):
            found = layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - without).abs().max() > 0.1
        torch.testing.assert_close(layer(x), without, rtol=0, atol=0)


@pytest.mark.parametrize("is_unpatched", [True, False])
@pytest.mark.parametrize("x", [torch.ones(2, 7, 6), torch.ones(6, 7, 2).mT.transpose(0, 1), torch.ones(0, 6)])
def test_models_may_add_in_place_to_an_output(is_unpatched: bool, x: Tensor) -> None:
    layer = nn.Linear(x.shape[-1], 5).requires_grad_(False)
    branches = random_branches({"layer": layer}, 2, 1.0)
    with injected({"layer": layer}, branches, lambda module: is_unpatched):
        found = layer(x)
    found += 1
    found.sum().backward()
    assert found.shape == (*x.shape[:-1], 5) and branches["layer"].up.compute.grad.any() == bool(x.numel())


@pytest.mark.parametrize("kind", ["linear on tokens", "conv2d"])
def test_the_output_keeps_the_model_dtype(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().bfloat16(), torch.randn(shape, generator=seeded()).bfloat16()
    branches = random_branches({"layer": layer}, 3, 1.5)
    expected = with_delta(copy.deepcopy(layer).float(), branches["layer"])(x.float())
    with injected({"layer": layer}, branches):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.05)
    found.sum().backward()
    assert branches["layer"].lora_down.dtype == torch.float32 and branches["layer"].down.compute.grad.any()


def test_a_new_branch_changes_no_output() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 6, generator=seeded())
    layers = preset_layers(model, "all")
    branches = new_branches(layers, 4, 2.0)
    before = model(x)
    with injected(layers, branches):
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    for branch in branches.values():
        assert not branch.lora_up.any()
        bound = 1 / math.sqrt(branch.lora_down.shape[1])
        assert 0.5 * bound < branch.lora_down.abs().max() <= bound


def test_hooks_are_removed_on_exit_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    layers = preset_layers(model, "all")
    branches = new_branches(layers, 2, 1.0)

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    with injected(layers, branches):
        assert hooks() == 2
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="stop"), injected(layers, branches):
        raise RuntimeError("stop")
    assert hooks() == 0
    with pytest.raises(KeyError), injected({"0": model[0]}, branches):
        pass  # the second layer is missing: the hook of the first is removed too
    assert hooks() == 0


def test_gradients_reach_only_the_branches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4)).requires_grad_(False)
    layers = preset_layers(model, "all")
    branches = random_branches(layers, 2, 1.0)
    x = torch.randn(2, 3, 4, 4, generator=seeded())
    with injected(layers, branches):
        model(x).square().sum().backward()
    assert x.grad is None and all(parameter.grad is None for parameter in model.parameters())
    factors = [factor.compute for branch in branches.values() for factor in (branch.down, branch.up)]
    assert len(factors) == 4
    for factor in factors:
        assert factor.is_leaf and factor.grad is not None and factor.grad.abs().sum() > 0


IS_UNPATCHED = {"hook": lambda module: False, "fused": lambda module: True}


@pytest.mark.parametrize("way", IS_UNPATCHED)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("input_learns", "channels_last"), [(True, False), (False, False), (True, True)])
def test_the_gradients_match_autograd_through_the_delta_weight(
    kind: str, way: str, input_learns: bool, channels_last: bool
) -> None:
    """Against float64 autograd through weight + delta, for fused layers and for hooks."""
    make, shape = LAYERS[kind]
    layer = make().requires_grad_(False)
    x = torch.randn(shape, generator=seeded())
    x = x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
    x.requires_grad_(input_learns)
    branch = random_branches({"layer": layer}, 3, 1.5)["layer"]
    with injected({"layer": layer}, {"layer": branch}, IS_UNPATCHED[way]):
        for _ in range(2):  # gradients of the second pass are added to those of the first
            output = layer(x)
            (output**2).sum().backward()
    exact, given = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    down, up = (factor.detach().double().requires_grad_() for factor in (branch.lora_down, branch.lora_up))
    weight = exact.weight + (branch.scale * up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
    expected = torch.func.functional_call(exact, {"weight": weight}, (given,))
    (expected**2).sum().backward()
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-4)
    for found, wanted in ((branch.down.compute.grad, down.grad), (branch.up.compute.grad, up.grad)):
        torch.testing.assert_close(found, 2 * wanted.float(), rtol=1e-4, atol=1e-3)
    if input_learns:
        torch.testing.assert_close(x.grad, 2 * given.grad.float(), rtol=1e-4, atol=1e-3)
    assert layer.weight.grad is None and "forward" not in vars(layer)


def test_convolution_weights_are_reordered_in_their_own_memory_and_restored() -> None:
    layer = nn.Conv2d(70, 130, 3, padding=1).requires_grad_(False)  # more output channels than are reordered at a time
    own, before = layer.weight, layer.weight.clone()
    branches = random_branches({"layer": layer}, 3, 1.5)
    with pytest.raises(RuntimeError, match="stop"), injected({"layer": layer}, branches, IS_UNPATCHED["fused"]):
        assert layer.weight.data_ptr() == own.data_ptr() and torch.equal(layer.weight, before)
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        raise RuntimeError("stop")
    assert layer.weight is own and torch.equal(own, before)


def test_a_quantised_layer_with_the_interface_of_linear_is_trained_too() -> None:
    class Quantised(nn.Module):
        """Like the quantised layers of ComfyUI and other packs: integers and a scale, and no nn.Linear."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 5
            self.register_buffer("quantised", torch.randint(-127, 128, (5, 6), generator=seeded(), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.quantised.float() / 127).T

    model, x = nn.ModuleDict({"layer": Quantised()}), torch.randn(2, 3, 6, generator=seeded())
    layers = preset_layers(model, "all")
    branches = random_branches(layers, 2, 2.0)
    before = model["layer"](x)
    with injected(layers, branches):
        added = model["layer"](x) - before
    expected = x @ (branches["layer"].lora_up @ branches["layer"].lora_down).T
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)


def _noting(kept: list[torch.Size], saved: Tensor) -> Tensor:
    kept.append(saved.shape)
    return saved


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_a_weight_that_is_converted_learns_as_its_dense_copy(dtype: torch.dtype) -> None:
    """And no converted weight is kept between the passes."""
    torch.manual_seed(2)
    dense = nn.Linear(6, 5).requires_grad_(False)
    dense.weight.copy_(dense.weight.to(dtype))
    dense.bias.copy_(dense.bias.to(dtype))
    short = copy.deepcopy(dense).to(dtype)
    kept: list[torch.Size] = []
    found = []
    for layer in (dense, short):
        branches = random_branches({"layer": layer}, 3, 1.5)
        x = torch.randn(7, 6, generator=seeded(), requires_grad=True)
        with (
            injected({"layer": layer}, branches, lambda module: True),
            torch.autograd.graph.saved_tensors_hooks(partial(_noting, kept), lambda it: it),
        ):
            output = layer(x)
        output.square().sum().backward()
        branch = branches["layer"]
        found.append([output.detach(), x.grad, branch.down.compute.grad, branch.up.compute.grad])
    assert dense.weight.shape not in kept and kept
    for with_dense, with_short in zip(*found, strict=True):
        torch.testing.assert_close(with_short, with_dense, rtol=1e-6, atol=1e-6)
        assert with_short.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [2, 5, 30])  # narrow, and so wide that the product is added to the branch
def test_layer_and_branch_together_give_what_they_give_apart(outputs: int, bias: bool) -> None:
    torch.manual_seed(3)
    layer = nn.Linear(6, outputs, bias=bias).requires_grad_(False)
    found = []
    for together in (False, True):
        branches = random_branches({"layer": layer}, 2, 1.5)
        x = torch.randn(7, 6, generator=seeded(), requires_grad=True)
        with injected({"layer": layer}, branches, lambda module, together=together: together):
            output = layer(x)
        output.square().sum().backward()
        branch = branches["layer"]
        found.append([output.detach(), x.grad, branch.down.compute.grad, branch.up.compute.grad])
    for apart, joint in zip(*found, strict=True):
        torch.testing.assert_close(joint, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_converted_is_not_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    weights = make_parameters({"layer": layer}, LoraSpec(2, 1.0), seeded(), CPU, torch.bfloat16)
    x, kept = torch.randn(3, 64, dtype=dtype, requires_grad=True), list[torch.Size]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with (
        injected({"layer": layer}, weights.layers, lambda module: True),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = layer(x)
    assert output.dtype == dtype and kept and torch.Size([64, 64]) not in kept
    output.sum().backward()
    expected = torch.ones(3, 64) @ layer.weight.float()
    torch.testing.assert_close(x.grad.float(), expected, rtol=2e-2, atol=2e-2)
