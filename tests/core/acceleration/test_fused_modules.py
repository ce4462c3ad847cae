"""Fused modules: equal results, replaced only where they may be, and restored afterwards."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aclora_core.acceleration import fused_modules as module_under_test
from aclora_core.acceleration.activation_checkpointing import ActivationCheckpointing
from aclora_core.acceleration.fused_modules import FusableModules, fuse_modules
from aclora_core.acceleration.kernels import Kernels
from aclora_core.lora.injection import injected
from aclora_core.lora.parameters import LoraSpec, make_parameters
from aclora_core.lora.targets import preset_layers
from tests.support.kernel_stand_ins import reference_kernels

LAST = torch.channels_last


class OwnNorm(nn.GroupNorm):
    """As the host's, which may cast its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class Transformer(nn.Module):
    """As the host's: an image becomes rows and an image again, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.out = OwnNorm(2, 8), Gate(), nn.Linear(6, 8)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        n, _, h, w = x.shape
        rows = self.norm(x).movedim(1, 3).flatten(1, 2).contiguous()
        rows = self.out(self.gate(rows)) + shift
        return rows.reshape(n, h, w, -1).movedim(3, 1).contiguous() + x


class Residual(nn.Module):
    """As the host's: the time embedding is added to every pixel."""

    def __init__(self, **special: bool) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(OwnNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 6, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(5, 6))
        self.out_layers = nn.Sequential(OwnNorm(3, 6), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(6, 6, 3, padding=1))
        self.skip_connection = nn.Conv2d(8, 6, 1)
        for name, value in special.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift = self.emb_layers(emb)
        while shift.dim() < x.dim():
            shift = shift[..., None]
        return self.skip_connection(x) + self.out_layers(self.in_layers(x) + shift)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.transformer = Transformer()
        self.leave = nn.Sequential(OwnNorm(4, 8), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.transformer(self.enter(x), shift=0.5))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = Network().requires_grad_(False)
    for norm in (it for it in network.modules() if isinstance(it, nn.GroupNorm)):
        norm.weight.normal_()
        norm.bias.normal_()
    return network


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Put the references in the kernels' place, and count their calls."""
    counted: Counter[str] = Counter()
    ours = reference_kernels(Kernels, counted)
    monkeypatch.setattr(module_under_test, "_kernels_for", lambda network, dtype: lambda group: ours)
    return counted


def image(seed: int = 1) -> Tensor:
    return torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=LAST)


def forwards(network: nn.Module) -> list[str]:
    """Names of the modules whose forward is replaced."""
    return [name for name, module in network.named_modules() if "forward" in vars(module)]


def output_and_gradient(network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    output = network(x)
    return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]


def plain(module: nn.Module) -> bool:
    return True


def test_results_are_equal_and_the_kernels_are_used(network: Network, calls: Counter[str]) -> None:
    expected = output_and_gradient(network, image())
    with fuse_modules(network, plain, FusableModules(Gate, Transformer)):
        found = output_and_gradient(network, image())
    torch.testing.assert_close(found, expected)
    assert calls == {"group_norm silu": 2, "group_norm": 1, "geglu": 1}
    assert not forwards(network)


def test_images_stay_channels_last_through_a_transformer(network: Network, calls: Counter[str]) -> None:
    x = image()
    assert not network.transformer(x).is_contiguous(memory_format=LAST)
    with fuse_modules(network, plain, FusableModules(transformer=Transformer)):
        assert network.transformer(x).is_contiguous(memory_format=LAST)
        assert x.transpose(2, 3).contiguous().is_contiguous()  # outside it, nothing is changed


class JointAttention(nn.Module):
    """As the host's: the heads of a caption and of an image are joined."""

    def forward(self, caption: Tensor, image: Tensor, transformer_options: Any = None) -> Tensor:
        return torch.cat([rows.unflatten(-1, (2, 4)).transpose(1, 2) for rows in (caption, image)], dim=2)


def test_heads_stay_in_the_order_in_which_they_are_in_memory(calls: Counter[str]) -> None:
    network, given = JointAttention(), (torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    expected = network(*given)
    with fuse_modules(network, plain, FusableModules(heads=(nn.ReLU, JointAttention))):
        found = network(*given, transformer_options={"patches": {}})
        patched = network(*given, transformer_options={"patches": {"attn1_patch": [print]}})
    torch.testing.assert_close((found, patched), (expected, expected))
    assert expected.is_contiguous() and patched.is_contiguous() and found.transpose(1, 2).is_contiguous()
    assert not forwards(network)


def test_channels_first_and_other_dtypes_take_the_modules_own_forward(network: Network, calls: Counter[str]) -> None:
    x = torch.randn(2, 8, 5, 6)
    expected = network.leave(x)
    with fuse_modules(network, plain):
        assert torch.equal(network.leave(x), expected)
        network.double().leave(x.double().contiguous(memory_format=LAST))
    assert not calls


def test_a_subclass_is_replaced_only_if_it_is_unpatched(network: Network, calls: Counter[str]) -> None:
    with fuse_modules(network, lambda module: False, FusableModules(Gate)):
        assert forwards(network) == ["enter", "enter.0", "transformer.gate"]
        network(image())
    assert calls == {"group_norm silu": 1, "geglu": 1}


def test_norms_without_weights_and_gates_of_another_class_are_left_alone(calls: Counter[str]) -> None:
    class OtherGate(Gate):
        pass

    network = nn.ModuleList([nn.GroupNorm(2, 8, affine=False), OtherGate(), nn.Sequential(nn.Linear(2, 2), nn.SiLU())])
    with fuse_modules(network, plain, FusableModules(Gate, Transformer)):
        assert not forwards(network)


def test_a_sequence_whose_modules_are_called_one_by_one_is_not_fused(network: Network, calls: Counter[str]) -> None:
    """Some networks put something between the norm and the SiLU."""
    x = image()
    expected = network.leave[1:](2 * network.leave[0](x))
    with fuse_modules(network, plain):
        found = network.leave[1:](2 * network.leave[0](x))
    torch.testing.assert_close(found, expected)
    assert calls == {"group_norm": 1}


@pytest.mark.parametrize("part", [0, 1])
def test_hooks_on_a_norm_or_its_silu_are_still_called(part: int, network: Network, calls: Counter[str]) -> None:
    seen: list[Tensor] = []
    handle = network.enter[part].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with fuse_modules(network, plain):
        network.enter(image())
    handle.remove()
    assert len(seen) == 1 and calls == {"group_norm": 1}


def test_a_forward_that_is_already_replaced_stays(network: Network, calls: Counter[str]) -> None:
    def forward(x: Tensor) -> Tensor:
        return x

    network.enter[0].forward = forward
    with fuse_modules(network, plain):
        assert torch.equal(network.enter(image()), network.enter[2](F.silu(image())))
    assert vars(network.enter[0])["forward"] is forward and forwards(network) == ["enter.0"]


def test_all_forwards_are_restored_after_an_error(network: Network, calls: Counter[str]) -> None:
    with pytest.raises(ZeroDivisionError), fuse_modules(network, plain, FusableModules(Gate, Transformer)):
        assert forwards(network)
        raise ZeroDivisionError
    assert not forwards(network)


def test_another_that_replaces_the_same_forward_is_no_error(network: Network, calls: Counter[str]) -> None:
    with fuse_modules(network, plain, FusableModules(Gate)):
        network.transformer.gate.forward = lambda x: x
        del network.transformer.gate.forward
    assert not forwards(network)


def test_on_the_cpu_nothing_is_replaced(network: Network) -> None:
    with fuse_modules(network, plain, FusableModules(Gate, Transformer)):
        assert not forwards(network)
    with fuse_modules(nn.ReLU(), plain):  # a network without weights
        pass


@contextmanager
def nothing(*_: object) -> Iterator[None]:
    yield


@pytest.mark.parametrize("recompute", [False, True])
def test_kernels_leave_an_adapters_gradients_equal(recompute: bool, network: Network, calls: Counter[str]) -> None:
    """The gate's projection has a branch too; blocks may be recomputed."""

    def gradient(context: Callable[..., object]) -> Tensor:
        layers = preset_layers(network, "all")
        weights = make_parameters(layers, LoraSpec(2, 2.0), torch.Generator().manual_seed(1), torch.device("cpu"))
        weights.master.normal_(generator=torch.Generator().manual_seed(2))
        weights.refresh()
        memory = ActivationCheckpointing(network)
        if recompute:
            memory.recompute_all()
        quick = context(network, plain, FusableModules(Gate, Transformer))
        with quick, injected(layers, weights.layers, plain), memory.attached():  # type: ignore[attr-defined]
            network(image()).square().sum().backward()
        assert not forwards(network)
        return weights.gradient.clone()

    expected = gradient(nothing)
    torch.testing.assert_close(gradient(fuse_modules), expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.1 and calls["geglu"] > 0


def block_and_gradients(block: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x, emb = x.detach().requires_grad_(), torch.linspace(-2, 2, 10).view(2, 5).requires_grad_()
    output = block(x, emb)
    return output.detach(), *torch.autograd.grad(output.square().sum(), (x, emb))


def test_a_residual_block_adds_its_shift_within_the_norm(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    block = Residual().requires_grad_(False)
    expected = block_and_gradients(block, image())
    with fuse_modules(block, plain, FusableModules(residual=Residual)):
        found = block_and_gradients(block, image())
        assert calls == {"group_norm silu": 1, "group_norm silu shift": 1}
        channels_first = block_and_gradients(block, image().contiguous())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(channels_first, expected, rtol=1e-5, atol=1e-5)  # additions in another order
    assert not forwards(block)


@pytest.mark.parametrize("special", ["updown", "use_scale_shift_norm", "exchange_temb_dims", "use_checkpoint"])
def test_residual_blocks_that_do_more_keep_their_forward(special: str, calls: Counter[str]) -> None:
    block = Residual(**{special: True})
    with fuse_modules(block, plain, FusableModules(residual=Residual)):
        assert "" not in forwards(block)
        block(image(), torch.ones(2, 5))
    assert "group_norm silu shift" not in calls


def test_a_residual_block_without_a_fusable_norm_keeps_its_forward(calls: Counter[str]) -> None:
    block = Residual()
    handle = block.out_layers[0].register_forward_hook(lambda *_: None)
    with fuse_modules(block, plain, FusableModules(residual=Residual)):
        assert "" not in forwards(block)
    handle.remove()


class OwnRows(nn.LayerNorm):
    """As a host's, which may cast its weights."""


def test_layer_norms_are_replaced_if_they_are_unpatched(calls: Counter[str]) -> None:
    norms = nn.Sequential(nn.LayerNorm(6), OwnRows(6), nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm((5, 6)))
    x = torch.randn(3, 5, 6)
    expected = norms(x)
    with fuse_modules(norms, lambda module: type(module) is not OwnRows):
        torch.testing.assert_close(norms(x), expected)
        assert forwards(norms) == ["0"] and calls == {"layer_norm": 1}
        norms.double()(x.double())
    assert calls == {"layer_norm": 1} and not forwards(norms)


def test_rms_norms_and_gelus_of_strided_rows_are_replaced(calls: Counter[str]) -> None:
    norms = nn.Sequential(nn.RMSNorm(6), nn.RMSNorm(6, eps=0.1), nn.RMSNorm(6, elementwise_affine=False), nn.GELU())
    x = (torch.randn(3, 5, 12) / 1000)[..., :6]  # so small that the eps matters
    expected = norms(x)
    with fuse_modules(norms, lambda module: True):
        torch.testing.assert_close(norms(x), expected)
        assert forwards(norms) == ["0", "1", "3"] and calls == {"rms_norm": 2}
        torch.testing.assert_close(norms[3](x), F.gelu(x))
        assert calls == {"rms_norm": 2, "gelu": 1}
    assert not forwards(norms)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
        return self.out(x * (1 if context is None else context.mean()))


class Block(nn.Module):
    """As the host's, which patches may change."""

    def __init__(self, **special: object) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (OwnRows(6) for _ in range(3))
        self.attn1, self.attn2, self.ff = Attention(), Attention(), nn.Linear(6, 6)
        self.ff_in = self.disable_self_attn = self.switch_temporal_ca_to_sa = False
        self.is_res = True
        for name, value in special.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        if "patches" in transformer_options:
            return 0 * x
        x = self.attn1(self.norm1(x)) + x
        if self.attn2 is not None:
            x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


def test_a_transformer_block_adds_its_residuals_within_its_norms(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    block, context = Block().requires_grad_(False), torch.full((2, 3), 1.5)
    results = []
    for _ in range(2):
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = block(x, context)
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), x)[0]))
        if len(results) == 1:
            undo = fuse_modules(block, plain, FusableModules(block=Block))
            undo.__enter__()
    assert calls == {"residual_norm": 1, "residual_norm residual": 2}
    assert not block(x, context, {"patches": {"attn1_patch": [None]}}).any()  # the block's own forward
    torch.testing.assert_close(block.double()(x.double(), context.double()).float(), results[0][0])
    assert calls == {"residual_norm": 1, "residual_norm residual": 2}
    undo.__exit__(None, None, None)
    torch.testing.assert_close(*results)
    assert not forwards(block)


@pytest.mark.parametrize("special", ["ff_in", "disable_self_attn", "switch_temporal_ca_to_sa", "attn2", "is_res"])
def test_transformer_blocks_that_do_more_or_less_keep_their_forward(special: str, calls: Counter[str]) -> None:
    block = Block(**{special: {"attn2": None, "is_res": False}.get(special, True)})
    with fuse_modules(block, plain, FusableModules(block=Block)):
        assert "" not in forwards(block)


def test_a_transformer_block_with_a_hook_on_a_norm_keeps_its_forward(calls: Counter[str]) -> None:
    block = Block()
    handle = block.norm2.register_forward_hook(lambda *_: None)
    with fuse_modules(block, plain, FusableModules(block=Block)):
        assert "" not in forwards(block)
    handle.remove()
