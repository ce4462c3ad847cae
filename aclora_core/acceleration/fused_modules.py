"""Faster ways through modules that are not trained, for as long as a training lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .kernels import DTYPES, KernelGroup, Kernels, find_kernels

Forward = Callable[..., Any]


# What residual blocks and those of transformers have set where they do more than usual.
_SPECIAL_IN_BLOCKS = ("ff_in", "disable_self_attn", "switch_temporal_ca_to_sa")


_SPECIAL = ("updown", "use_scale_shift_norm", "exchange_temb_dims", "use_checkpoint")


class FusableModules(NamedTuple):
    """The classes of a network's modules that are known from within, as far as it has them.

    geglu: gated GELUs, value · GELU(gate) of the halves of what its `proj` gives.
    transformer: transformers on pictures. They turn a picture back to channels first, which costs a copy, and has every
    module behind them work in that order; they are kept from it.
    residual: residual blocks, x -> skip(x) + out(in(x) + emb(e)): the sum goes into out's norm.
    block: blocks of transformers, of two attentions and a feed-forward network, each behind a norm and added to what it
    came from: the sums go into the norms.
    """

    geglu: type[nn.Module] | None = None
    transformer: type[nn.Module] | None = None
    residual: type[nn.Module] | None = None
    block: type[nn.Module] | None = None


@contextmanager
def fuse_modules(
    network: nn.Module, is_unpatched: Callable[[nn.Module], bool], classes: FusableModules = FusableModules()
) -> Iterator[None]:
    """Has the network's norms and gates computed by kernels of ours, if they are to be had; undone at the end.

    is_unpatched: whether a module that is a subclass of nn.GroupNorm, nn.LayerNorm or nn.RMSNorm computes as those do.
    """
    find = _kernels_for(network)
    with ExitStack() as undo:
        for module, part, make in _replacements(network, is_unpatched, classes):
            kernels = find(part)
            forward = None if kernels is None else make(kernels)
            if forward is not None:
                module.forward = forward
                undo.callback(_take_back, module, forward)
        yield


def _kernels_for(network: nn.Module) -> Callable[[KernelGroup], Kernels | None]:
    """Finds kernels for the GPU that the network is on, and the type of its weights there."""
    weight = next((it for it in network.parameters() if it.is_cuda and it.dtype in DTYPES), None)
    return lambda part: None if weight is None else find_kernels(weight.device, weight.dtype, part)


def _take_back(module: nn.Module, forward: Forward) -> None:
    if vars(module).get("forward") is forward:  # else another has replaced it since, and has taken it back for us
        del module.forward


def _replacements(
    network: nn.Module, is_unpatched: Callable[[nn.Module], bool], classes: FusableModules
) -> Iterator[tuple[nn.Module, KernelGroup, Callable[[Kernels], Forward | None]]]:
    """The modules to be computed in another way, the kernels that it takes, and how; None for one that stays."""
    for module in network.modules():
        if "forward" in vars(module):
            continue
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            if _can_norm(module, is_unpatched):
                norm, part = _NORMS[next(kind for kind in _NORMS if isinstance(module, kind))]
                yield module, part, partial(norm, module, module.forward)
        elif type(module) is nn.GELU:
            yield module, "sequences", partial(_gelu, module, module.forward)
        elif type(module) is classes.residual:
            yield module, "pictures", partial(_shifted, module, is_unpatched)
        elif type(module) is classes.block:
            yield module, "pictures", partial(_sums_in_norms, module, is_unpatched)
        elif type(module) is nn.Sequential:
            pairs = _pairs(module, is_unpatched)
            if any(silu for _, silu in pairs):
                yield module, "pictures", partial(_sequence, pairs)
        elif type(module) is classes.geglu:
            yield module, "pictures", partial(_gate, module)
        elif type(module) is classes.transformer:
            yield module, "pictures", partial(_in_its_layout, module.forward)


def _can_norm(module: nn.Module, is_unpatched: Callable[[nn.Module], bool]) -> bool:
    by_rows = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1
    return (
        (by_rows or isinstance(module, nn.GroupNorm))
        and module.weight is not None
        and (isinstance(module, nn.RMSNorm) or module.bias is not None)
        and (type(module) in (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm) or is_unpatched(module))
    )


def _norm(module: nn.GroupNorm, own: Forward, kernels: Kernels) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if not kernels.take_picture(input):
            return own(input)
        return kernels.group_norm(input, module.num_groups, module.weight, module.bias, module.eps)

    return forward


def _norm_rows(module: nn.LayerNorm, own: Forward, kernels: Kernels) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if not kernels.take_rows(input):
            return own(input)
        return kernels.layer_norm(input, module.weight, module.bias, module.eps)

    return forward


def _rms_norm(module: nn.RMSNorm, own: Forward, kernels: Kernels) -> Forward:
    # PyTorch computes in float32, and that type's is what it takes where none is given.
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps

    def forward(x: Tensor) -> Tensor:
        if not kernels.take_rows(x):
            return own(x)
        return kernels.rms_norm(x, module.weight, eps)

    return forward


def _gelu(module: nn.GELU, own: Forward, kernels: Kernels) -> Forward:
    def forward(input: Tensor) -> Tensor:
        if input.is_contiguous() or not kernels.take(input):  # else PyTorch's is as quick
            return own(input)
        return kernels.gelu(input, module.approximate == "tanh")

    return forward


_NORMS: dict[type[nn.Module], tuple[Callable[..., Forward], KernelGroup]] = {
    nn.GroupNorm: (_norm, "pictures"),
    nn.LayerNorm: (_norm_rows, "pictures"),
    nn.RMSNorm: (_rms_norm, "sequences"),
}


def _pairs(
    modules: nn.Sequential, is_unpatched: Callable[[nn.Module], bool]
) -> list[tuple[nn.Module, nn.Module | None]]:
    """The modules in their order, each with the SiLU that follows it if it is a norm and both can be one."""
    pairs: list[tuple[nn.Module, nn.Module | None]] = []
    for module in modules:
        before = pairs[-1] if pairs else (None, None)
        joins = type(module) is nn.SiLU and before[1] is None and _is_lone_norm(before[0], is_unpatched)
        if joins and not _has_hooks(module):
            pairs[-1] = before[0], module  # type: ignore[assignment]
        else:
            pairs.append((module, None))
    return pairs


def _is_lone_norm(module: nn.Module | None, is_unpatched: Callable[[nn.Module], bool]) -> bool:
    return isinstance(module, nn.GroupNorm) and _is_untouched(module, is_unpatched)


def _is_untouched(norm: nn.Module, is_unpatched: Callable[[nn.Module], bool]) -> bool:
    """Whether nobody but us would notice that the norm itself is not called."""
    return "forward" not in vars(norm) and not _has_hooks(norm) and _can_norm(norm, is_unpatched)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be called when the module is."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def _sequence(pairs: list[tuple[nn.Module, nn.Module | None]], kernels: Kernels) -> Forward:
    def forward(input: Any, shift: Tensor | None = None) -> Any:
        """shift: (n, channels), added to every pixel before the first module, which is then a norm with its SiLU."""
        for module, silu in pairs:
            if silu is None:
                input = module(input)
            elif kernels.take_picture(input):
                norm: Any = module
                input = kernels.group_norm(input, norm.num_groups, norm.weight, norm.bias, norm.eps, True, shift)
            else:
                input = silu(module(input if shift is None else input + shift[:, :, None, None]))
            shift = None
        return input

    return forward


def _shifted(module: Any, is_unpatched: Callable[[nn.Module], bool], kernels: Kernels) -> Forward | None:
    """A residual block's forward; None for one that does more than is told above."""
    special = any(getattr(module, name, False) for name in _SPECIAL) or module.emb_layers is None
    pairs = _pairs(module.out_layers, is_unpatched)
    if special or not pairs or pairs[0][1] is None or _has_hooks(module.out_layers):
        return None
    leave, own = _sequence(pairs, kernels), module.forward

    def forward(x: Tensor, emb: Tensor) -> Tensor:
        if x.dim() != 4 or emb.dim() != 2:
            return own(x, emb)
        within = module.in_layers(x)
        return module.skip_connection(x) + leave(within, module.emb_layers(emb).to(within.dtype))

    return forward


def _sums_in_norms(module: Any, is_unpatched: Callable[[nn.Module], bool], kernels: Kernels) -> Forward | None:
    """A transformer block's forward; None for one that does more than is told above."""
    special = any(getattr(module, name) for name in _SPECIAL_IN_BLOCKS) or module.attn2 is None or not module.is_res
    norms = [module.norm1, module.norm2, module.norm3] if not special else []
    if special or not all(_is_untouched(norm, is_unpatched) for norm in norms):
        return None
    enter, between, leave = (_residual_norm(norm, kernels) for norm in norms)
    own = module.forward

    def forward(x: Tensor, context: Any = None, transformer_options: Any = {}) -> Tensor:  # noqa: B006
        if transformer_options.get("patches") or transformer_options.get("patches_replace"):
            return own(x, context=context, transformer_options=transformer_options)
        x, normed = enter(x, None)
        x, normed = between(x, module.attn1(normed, transformer_options=transformer_options))
        x, normed = leave(x, module.attn2(normed, context=context, transformer_options=transformer_options))
        return x + module.ff(normed)

    return forward


def _residual_norm(norm: Any, kernels: Kernels) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """x and what is to be added -> their sum, and that normed."""

    def both(x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        alike = added is None or (added.shape == x.shape and added.dtype == x.dtype)
        if alike and kernels.take_rows(x):
            return kernels.residual_norm(x, added, norm.weight, norm.bias, norm.eps)
        x = x if added is None else added + x
        return x, norm(x)

    return both


def _gate(module: Any, kernels: Kernels) -> Forward:
    def forward(x: Tensor) -> Tensor:
        hidden = module.proj(x)
        if kernels.take(hidden):
            return kernels.geglu(hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return forward


def _in_its_layout(own: Forward, kernels: Kernels) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _KeepLayout():
            return own(*args, **kwargs)

    return forward


class _KeepLayout(TorchFunctionMode):
    """Has x.contiguous() give x itself where x is a picture whose channels come last in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous and len(args) == 1 and not kwargs:
            (x,) = args
            if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                return x
        return func(*args, **(kwargs or {}))
