"""Replace the forward of frozen modules by fused kernels while a training runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .head_order import KeepHeadOrder
from .kernels import KernelGroup, Kernels, find_kernels

Forward = Callable[..., Any]


# Attributes that residual blocks and transformer blocks set if they do more than usual.
_SPECIAL_IN_RESIDUAL = ("updown", "use_scale_shift_norm", "exchange_temb_dims", "use_checkpoint")
_SPECIAL_IN_BLOCK = ("ff_in", "disable_self_attn", "switch_temporal_ca_to_sa")
# Options of a transformer that hand heads to functions of others, which may rely on their order in memory
_GET_HEADS = ("patches", "optimized_attention_override")


class FusableModules(NamedTuple):
    """Module classes of a network whose inner structure is known; None for those it does not have.

    Attributes:
        geglu: gated GELU, value · GELU(gate) of the halves of the output of `proj`.
        transformer: transformer on images. It converts its input to channels-first, which costs a copy and makes all
            modules behind it work in that format; while fused it keeps channels-last images.
        residual: residual block, x -> skip(x) + out(in(x) + emb(e)); the sum moves into the norm of `out`.
        block: transformer block of two attentions and a feed-forward network, each behind a norm and added to its
            input; the sums move into the norms.
        heads: modules that view a layer's output as heads of an attention, and split or join these; they stay in the
            order in which they are in memory, unless a patch of another pack receives them.
    """

    geglu: type[nn.Module] | None = None
    transformer: type[nn.Module] | None = None
    residual: type[nn.Module] | None = None
    block: type[nn.Module] | None = None
    heads: tuple[type[nn.Module] | None, ...] = ()


_NOTHING_FUSABLE = FusableModules()


@contextmanager
def fuse_modules(
    network: nn.Module,
    is_unpatched: Callable[[nn.Module], bool],
    classes: FusableModules = _NOTHING_FUSABLE,
    dtype: torch.dtype = torch.float32,
) -> Iterator[None]:
    """Compute a network's norms, gates and blocks by fused kernels, where there are any; restored on exit.

    Args:
        network: the network; its modules' `forward` attributes are set.
        is_unpatched: whether an instance of a subclass of nn.GroupNorm, nn.LayerNorm or nn.RMSNorm computes as those
            do; it may convert its weight to the dtype of its input.
        classes: module classes of known structure.
        dtype: that the network computes in.
    """
    find = _kernels_for(network, dtype)
    with ExitStack() as undo:
        for module, group, make in _replacements(network, is_unpatched, classes):
            kernels = find(group)
            forward = None if kernels is None else make(kernels)
            if forward is not None:
                module.forward = forward
                undo.callback(_restore, module, forward)
        yield


def _kernels_for(network: nn.Module, dtype: torch.dtype) -> Callable[[KernelGroup], Kernels | None]:
    """Return a function that finds a group of kernels for the network's GPU and the dtype it computes in."""
    weight = next((weight for weight in network.parameters() if weight.is_cuda), None)
    return lambda group: None if weight is None else find_kernels(weight.device, dtype, group)


def _restore(module: nn.Module, forward: Forward) -> None:
    if vars(module).get("forward") is forward:  # otherwise another has replaced it since, and restored the class's
        del module.forward


def _replacements(
    network: nn.Module, is_unpatched: Callable[[nn.Module], bool], classes: FusableModules
) -> Iterator[tuple[nn.Module, KernelGroup, Callable[[Kernels], Forward | None]]]:
    """The modules to replace, the kernels needed, and a function that makes the forward; None leaves it as it is."""
    for module in network.modules():
        if "forward" in vars(module):
            continue
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            if _can_norm(module, is_unpatched):
                make, group = _NORMS[next(kind for kind in _NORMS if isinstance(module, kind))]
                yield module, group, partial(make, module, module.forward)
        elif type(module) is nn.GELU:
            yield module, "transformer", partial(_gelu, module, module.forward)
        elif type(module) is classes.residual:
            yield module, "unet", partial(_residual_block, module, is_unpatched)
        elif type(module) is classes.block:
            yield module, "unet", partial(_transformer_block, module, is_unpatched)
        elif type(module) is nn.Sequential:
            pairs = _norm_silu_pairs(module, is_unpatched)
            if any(silu for _, silu in pairs):
                yield module, "unet", partial(_sequence, pairs)
        elif type(module) is classes.geglu:
            yield module, "unet", partial(_geglu, module)
        elif type(module) is classes.transformer:
            yield module, "unet", partial(_channels_last_kept, module.forward)
        elif type(module) in classes.heads:
            yield module, "transformer", partial(_head_order_kept, module.forward)


def _can_norm(module: nn.Module, is_unpatched: Callable[[nn.Module], bool]) -> bool:
    by_rows = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1
    return (
        (by_rows or isinstance(module, nn.GroupNorm))
        and module.weight is not None
        and (isinstance(module, nn.RMSNorm) or module.bias is not None)
        and (type(module) in (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm) or is_unpatched(module))
    )


def _weights(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm as its kernel reads them."""
    return _converted(norm.weight, x), _converted(norm.bias, x)


def _converted(weight: Tensor, x: Tensor) -> Tensor:
    """A norm's weight in the dtype of its input; float32 stays, as it is more exact."""
    return weight if weight.dtype == torch.float32 else weight.to(x.dtype)


def _group_norm(module: nn.GroupNorm, own: Forward, kernels: Kernels) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if not kernels.group_norm.supports(input):
            return own(input)
        return kernels.group_norm(input, module.num_groups, *_weights(module, input), module.eps)

    return forward


def _layer_norm(module: nn.LayerNorm, own: Forward, kernels: Kernels) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if not kernels.layer_norm.supports(input):
            return own(input)
        return kernels.layer_norm(input, *_weights(module, input), module.eps)

    return forward


def _rms_norm(module: nn.RMSNorm, own: Forward, kernels: Kernels) -> Forward:
    # PyTorch computes in float32, and takes the eps of that dtype where none is given.
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps

    def forward(x: Tensor) -> Tensor:
        if not kernels.rms_norm.supports(x):
            return own(x)
        return kernels.rms_norm(x, _converted(module.weight, x), eps)

    return forward


def _gelu(module: nn.GELU, own: Forward, kernels: Kernels) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if not kernels.gelu.supports(input):
            return own(input)
        return kernels.gelu(input, module.approximate == "tanh")

    return forward


_NORMS: dict[type[nn.Module], tuple[Callable[..., Forward], KernelGroup]] = {
    nn.GroupNorm: (_group_norm, "unet"),
    nn.LayerNorm: (_layer_norm, "unet"),
    nn.RMSNorm: (_rms_norm, "transformer"),
}


def _norm_silu_pairs(
    modules: nn.Sequential, is_unpatched: Callable[[nn.Module], bool]
) -> list[tuple[nn.Module, nn.Module | None]]:
    """The modules in order; a norm is paired with the SiLU that follows it if they can be fused, others with None."""
    pairs: list[tuple[nn.Module, nn.Module | None]] = []
    for module in modules:
        norm, silu = pairs[-1] if pairs else (None, None)
        follows_norm = type(module) is nn.SiLU and silu is None and _is_fusable_group_norm(norm, is_unpatched)
        if follows_norm and not _has_hooks(module):
            pairs[-1] = norm, module  # type: ignore[assignment]
        else:
            pairs.append((module, None))
    return pairs


def _is_fusable_group_norm(module: nn.Module | None, is_unpatched: Callable[[nn.Module], bool]) -> bool:
    return isinstance(module, nn.GroupNorm) and _can_be_skipped(module, is_unpatched)


def _can_be_skipped(norm: nn.Module, is_unpatched: Callable[[nn.Module], bool]) -> bool:
    """Whether nothing depends on the norm module itself being called."""
    return "forward" not in vars(norm) and not _has_hooks(norm) and _can_norm(norm, is_unpatched)


def _has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def _sequence(pairs: list[tuple[nn.Module, nn.Module | None]], kernels: Kernels) -> Forward:
    def forward(input: Any, shift: Tensor | None = None) -> Any:
        """shift: (n, channels), added to each pixel; needs a norm with its SiLU as the first module."""
        for module, silu in pairs:
            if silu is None:
                input = module(input)
            elif kernels.group_norm.supports(input):
                norm: Any = module
                input = kernels.group_norm(input, norm.num_groups, *_weights(norm, input), norm.eps, True, shift)
            else:
                input = silu(module(input if shift is None else input + shift[:, :, None, None]))
            shift = None
        return input

    return forward


def _residual_block(module: Any, is_unpatched: Callable[[nn.Module], bool], kernels: Kernels) -> Forward | None:
    """A residual block's forward; None for a block that does more than FusableModules describes."""
    special = any(getattr(module, name, False) for name in _SPECIAL_IN_RESIDUAL) or module.emb_layers is None
    pairs = _norm_silu_pairs(module.out_layers, is_unpatched)
    if special or not pairs or pairs[0][1] is None or _has_hooks(module.out_layers):
        return None
    out_layers, own = _sequence(pairs, kernels), module.forward

    def forward(x: Tensor, emb: Tensor) -> Tensor:
        if x.dim() != 4 or emb.dim() != 2:
            return own(x, emb)
        hidden = module.in_layers(x)
        shift = module.emb_layers(emb).to(hidden.dtype)
        return module.skip_connection(x) + out_layers(hidden, shift)

    return forward


def _transformer_block(module: Any, is_unpatched: Callable[[nn.Module], bool], kernels: Kernels) -> Forward | None:
    """A transformer block's forward; None for a block that does more than FusableModules describes."""
    special = any(getattr(module, name) for name in _SPECIAL_IN_BLOCK) or module.attn2 is None or not module.is_res
    norms = [module.norm1, module.norm2, module.norm3] if not special else []
    if special or not all(_can_be_skipped(norm, is_unpatched) for norm in norms):
        return None
    norm1, norm2, norm3 = (_residual_norm(norm, kernels) for norm in norms)
    own = module.forward

    def forward(x: Tensor, context: Any = None, transformer_options: Any = {}) -> Tensor:  # noqa: B006
        if transformer_options.get("patches") or transformer_options.get("patches_replace"):
            return own(x, context=context, transformer_options=transformer_options)
        x, normed = norm1(x, None)
        x, normed = norm2(x, module.attn1(normed, transformer_options=transformer_options))
        x, normed = norm3(x, module.attn2(normed, context=context, transformer_options=transformer_options))
        return x + module.ff(normed)

    return forward


def _residual_norm(norm: Any, kernels: Kernels) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """(x, residual) -> x + residual, and that normalised."""

    def add_and_norm(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if kernels.residual_norm.supports(x, residual):
            return kernels.residual_norm(x, residual, *_weights(norm, x), norm.eps)
        x = x if residual is None else residual + x
        return x, norm(x)

    return add_and_norm


def _geglu(module: Any, kernels: Kernels) -> Forward:
    def forward(x: Tensor) -> Tensor:
        hidden = module.proj(x)
        if kernels.geglu.supports(hidden):
            return kernels.geglu(hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return forward


def _channels_last_kept(own: Forward, kernels: Kernels) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _KeepChannelsLast():
            return own(*args, **kwargs)

    return forward


def _head_order_kept(own: Forward, kernels: Kernels) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or {}
        if any(options.get(name) for name in _GET_HEADS):
            return own(*args, **kwargs)
        with KeepHeadOrder():
            return own(*args, **kwargs)

    return forward


class _KeepChannelsLast(TorchFunctionMode):
    """Make x.contiguous() return x itself if x is a channels-last image."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous and len(args) == 1 and not kwargs:
            (x,) = args
            if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                return x
        return func(*args, **(kwargs or {}))
