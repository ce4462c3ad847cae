"""Adapters that libraries put on a network: peft's and LyCORIS's, with the settings that a user of them gets.

Rank and alpha are the same numbers for all, whatever a library makes of them; everything else is the library's default
where nothing else is said. All dropout rates are 0. The weights are float32.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aclora_core.acceleration import is_linear
from aclora_core.diffusion import DiffusionModel

_NAME = "default"  # peft's own name for a single adapter


@dataclass(frozen=True, eq=False)
class Request:
    """What to put on a network, and where."""

    network: DiffusionModel
    layers: Mapping[str, nn.Module]  # by their full name, which begins with network.prefix
    rank: int
    alpha: float
    steps: int  # of the whole training
    initial: Mapping[str, tuple[Tensor, Tensor]]  # layer -> lora_down and lora_up that our own plain LoRA starts from

    def inner_name(self, layer: str) -> str:
        """Return the name of a layer inside the network."""
        return layer.removeprefix(self.network.prefix)


def _nothing(step: int) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that is on a network."""

    modules: Sequence[nn.Module]  # whose state is that of training or of evaluation
    parameters: Mapping[str, nn.Parameter]  # that are trained
    tensors: Callable[[], Mapping[str, Tensor]]  # what its file holds
    regularisation: Callable[[], Tensor] | None = None  # a term of the training loss, a scalar
    after_step: Callable[[int], None] = field(default=_nothing)  # called with the number of the step, from 1


# --- peft ---


def peft_lora(request: Request) -> Adapter:
    """Put on a plain LoRA, scale alpha / rank, that starts from the values of our own.

    peft draws lora_A from the same distribution; with the same values only the library differs. A layer that is too
    small for the rank has a lower one in ours; the rows that it lacks are zero, and stay so.
    """
    adapter = _lora(request)
    for name, values in request.initial.items():
        for factor, value in zip(("lora_A", "lora_B"), values, strict=True):
            weight = adapter.parameters[f"{request.inner_name(name)}.{factor}.{_NAME}.weight"]
            with torch.no_grad():
                weight.zero_()[tuple(slice(size) for size in value.shape)] = value.to(weight)
    return adapter


def rs_lora(request: Request) -> Adapter:
    """Put on rsLoRA: LoRA with the scale alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732)."""
    return _lora(request, use_rslora=True)


def dora(request: Request) -> Adapter:
    """Put on DoRA: LoRA of the direction, and a magnitude for each output (Liu et al. 2024, arXiv 2402.09353)."""
    return _lora(request, use_dora=True)


def _lora(request: Request, **options: Any) -> Adapter:
    peft = import_library("peft")
    targets = _layer_pattern(request, request.layers)
    config = peft.LoraConfig(r=request.rank, lora_alpha=request.alpha, target_modules=targets, **options)
    peft.inject_adapter_in_model(config, request.network.network, _NAME)
    parameters = _trainable(request.network.network)
    return Adapter(_peft_layers(request.network.network), parameters, lambda: parameters)


def ada_lora(request: Request) -> Adapter:
    """Put on AdaLoRA, which distributes a budget of ranks over the layers (Zhang et al. 2023, arXiv 2303.10512).

    Every layer starts with 1.5 times the rank, as in the paper and in peft's defaults (12 for 8), and the mean at the
    end is the rank. peft's defaults for the schedule, 0 and 0, would cut from the first step on, before the importance
    of any rank is known: here the budget is whole for the first tenth of the steps and final for the last half, about
    as in the paper's trainings. peft's AdaLoRA knows linear layers only, so convolutions are not adapted.

    Raises:
        ValueError: there is no linear layer.
    """
    peft = import_library("peft")
    network = request.network.network
    linear = [name for name, layer in request.layers.items() if is_linear(layer)]
    if not linear:
        raise ValueError("peft's AdaLoRA adapts linear layers only, and there is none among the layers.")
    config = peft.AdaLoraConfig(
        target_r=request.rank,
        init_r=max(request.rank + 1, request.rank * 3 // 2),
        lora_alpha=request.alpha,
        total_step=request.steps,
        tinit=request.steps // 10,
        tfinal=request.steps // 2,
        target_modules=_layer_pattern(request, linear),
    )
    tuner = peft.AdaLoraModel(network, config, _NAME)
    parameters = _trainable(network)

    def allocate(step: int) -> None:
        for parameter in parameters.values():  # after an overflow in float16 the importance would be NaN for good
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        tuner.update_and_allocate(step)

    return Adapter(
        _peft_layers(network),
        parameters,
        tensors=lambda: _allocated(parameters, config.rank_pattern or {}),
        # peft adds this to the loss that a network returns; a diffusion model returns none.
        regularisation=lambda: config.orth_reg_weight * _distance_from_orthogonal(parameters),
        after_step=allocate,
    )


def _distance_from_orthogonal(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over all layers (AdaLoRA Eq. 4, without the squares, as in peft)."""
    down = [factor @ factor.T for name, factor in parameters.items() if ".lora_A." in name]
    up = [factor.T @ factor for name, factor in parameters.items() if ".lora_B." in name]
    products = torch.stack(down + up)
    return torch.linalg.matrix_norm(products - torch.eye(products.shape[-1], device=products.device)).mean()


def _allocated(parameters: Mapping[str, Tensor], kept: Mapping[str, Sequence[bool]]) -> dict[str, Tensor]:
    """Return the parameters without the ranks that have lost their budget, as peft saves them.

    Args:
        parameters: lora_A (rank, in), lora_B (out, rank) and lora_E (rank, 1) of each layer.
        kept: the name of a layer's lora_E -> whether each of its ranks is kept.
    """
    tensors = dict(parameters)
    for name, ranks in kept.items():
        for factor, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            key = name.replace("lora_E", factor)
            index = torch.tensor(ranks, device=tensors[key].device).nonzero().flatten()
            tensors[key] = tensors[key].index_select(dim, index)
    return tensors


def _layer_pattern(request: Request, layers: Iterable[str]) -> str:
    """Return a pattern of these names alone; peft takes the names of a list as endings, which others may share."""
    return "|".join(re.escape(request.inner_name(name)) for name in layers)


def _peft_layers(network: nn.Module) -> list[nn.Module]:
    kind = import_library("peft.tuners.tuners_utils").BaseTunerLayer
    return [module for module in network.modules() if isinstance(module, kind)]


def _trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return peft's parameters, in float32: injected alone, they have the type of the layer beside them."""
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


# --- LyCORIS (Yeh et al. 2024, arXiv 2309.14859) ---


def loha(request: Request) -> Adapter:
    """Put on LoHa, the elementwise product of two low-rank products; scale alpha / rank."""
    return _lycoris(request, import_library("lycoris.modules").LohaModule)


def lokr(request: Request) -> Adapter:
    """Put on LoKr, the Kronecker product of a small matrix and a low-rank one; scale alpha / rank.

    By default both factors of the sides are as near to each other as can be (factor -1). Where half of the longer side
    of the second matrix is not above the rank, LyCORIS makes it a full matrix, and the scale 1.
    """
    return _lycoris(request, import_library("lycoris.modules").LokrModule)


def _lycoris(request: Request, kind: Callable[..., Any]) -> Adapter:
    """Put an adapter of LyCORIS beside each layer.

    bypass_mode adds the adapter's output to that of the layer. The default adds the delta to the weight first, which in
    bfloat16 would round most of the delta away.
    """
    modules = {}
    for name, layer in request.layers.items():
        key = f"lycoris_{request.inner_name(name).replace('.', '_')}"
        module = kind(key, layer, lora_dim=request.rank, alpha=request.alpha, bypass_mode=True)
        modules[key] = module.to(request.network.device)
        module.apply_to()
    parameters = _joined({key: dict(module.named_parameters()) for key, module in modules.items()})
    return Adapter(
        list(modules.values()),
        parameters,
        tensors=lambda: _joined({key: module.state_dict() for key, module in modules.items()}),
    )


def _joined(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{key}.{name}": value for key, part in parts.items() for name, value in part.items()}


def import_library(name: str) -> Any:
    """Import a module of a library.

    Raises:
        ModuleNotFoundError: a package of bench/requirements.txt is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Training with {name.partition('.')[0]} needs the package {error.name}, which is missing. Install it "
            "with: python -m pip install --no-deps -r bench/requirements.txt",
            name=error.name,
        ) from error
