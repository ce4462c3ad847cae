"""What a training depends on besides its own state, in few numbers that can be compared later.

A checkpoint goes on only with the same settings, pictures and model. Pictures are compared with a tolerance: encoded
once more on a GPU they may differ by rounding, while a retouched picture or a changed word differs by far more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..diffusion import Model
from ..storage import component_tensors, tensors_in
from ..text import name_list

_WITHOUT_EFFECT = {"checkpointing", "graph"}  # on speed and memory only


_SUMS = 8  # numbers that stand for a tensor


_TOLERANCE = 0.02  # of a tensor's root mean square


_SAMPLES = 64  # numbers of each weight of the model that are looked at


_SHARES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Fingerprint:
    """Settings by name, the tensors of each picture and its caption in a few sums, and facts of the model by name."""

    settings: dict[str, Any]
    pictures: list[list[list[float]]]
    model: dict[str, str]

    def state_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it; Fingerprint(**state) reads it again."""
        return {"settings": self.settings, "pictures": self.pictures, "model": self.model}


def training_fingerprint(model: Model, config: TrainConfig, pictures: Sequence[int]) -> Fingerprint:
    """Of a training that is about to begin. pictures: the numbers of those to learn from."""
    settings = {name: value for name, value in asdict(config).items() if name not in _WITHOUT_EFFECT}
    if model.regularisation:  # among the settings, where nothing is taken for rounding
        settings["regularisation_weight"] = sorted(set(model.regularisation.values()))
    signs: dict[int, Tensor] = {}
    sums = [
        [_sums(tensor, signs) for tensor in tensors_in(_parts(model, number))]
        for picture in pictures
        for number in model.variants.get(picture, [picture])
    ]
    return Fingerprint(json.loads(json.dumps(settings)), sums, _model_facts(model))


def _parts(model: Model, number: int) -> list[Any]:
    """What there is of a picture."""
    more = [model.masks[number]] if number in model.masks else []
    return [model.latents[number], model.conditioning([number]), *more]


def differences(before: Fingerprint, now: Fingerprint, free: Sequence[str] = ()) -> list[str]:
    """What is not as it was, each in a few words. free: settings that may differ."""
    return [
        *_setting_differences(before.settings, now.settings, free),
        *_picture_differences(before.pictures, now.pictures),
        *_model_differences(before.model, now.model),
    ]


def _setting_differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str]) -> Iterator[str]:
    defaults = json.loads(json.dumps(asdict(TrainConfig())))
    for name, value in now.items():
        # A setting that came with a later version had the effect of its default before.
        old = before.get(name, defaults.get(name))
        if old != value and name not in free:
            yield f"{name} was {_quoted(old)} and is {_quoted(value)}"


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _picture_differences(before: list[list[list[float]]], now: list[list[list[float]]]) -> Iterator[str]:
    if len(before) != len(now):
        yield f"there were {len(before)} pictures and are {len(now)}"
        return
    changed = [place for place, pair in enumerate(zip(before, now, strict=True), start=1) if not _alike(*pair)]
    if changed:
        first = name_list(changed, 5)
        which = (
            f"picture {first} of {len(now)} or its caption is"
            if len(changed) == 1
            else (f"pictures {first} of {len(now)} or their captions are")
        )
        yield f"{which} another than before" if len(changed) == 1 else f"{which} others than before"


def _alike(before: list[list[float]], now: list[list[float]]) -> bool:
    if [tensor[0] for tensor in before] != [tensor[0] for tensor in now]:
        return False
    for (_, size, *old), (_, _, *new) in zip(before, now, strict=True):
        if any(not abs(a - b) <= _TOLERANCE * size + 1e-6 for a, b in zip(old, new, strict=True)):
            return False
    return True


def _model_differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name, value in now.items():
        old = before.get(name, "unknown")
        if name in ("layers", "weights") and old != value:
            yield f"the model's {name} are others"
        elif old != value:
            yield f"the model's {name} was {old} and is {value}"


def _sums(tensor: Tensor, signs: dict[int, Tensor]) -> list[float]:
    """The number of elements, their root mean square, and eight sums of them with random signs, of the same size."""
    flat = tensor.detach().flatten().float().cpu()
    count = flat.numel()
    if count not in signs:
        generator = torch.Generator().manual_seed(count)
        signs[count] = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8) * 2 - 1
    padded = torch.nn.functional.pad(flat * signs[count], (0, -count % _SUMS))
    sums = padded.view(-1, _SUMS).sum(0, dtype=torch.float64) / math.sqrt(max(1, count / _SUMS))
    size = float(flat.double().square().mean().sqrt()) if count else 0.0
    return [count, *(float(f"{value:.6g}") for value in [size, *sums.tolist()])]


def _model_facts(model: Model) -> dict[str, str]:
    names, values = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    networks = [("", model.network), *model.text_encoders.items()]
    stored = [pair for prefix, part in networks for pair in _named_tensors(part, prefix)]
    for name, tensor in sorted(stored, key=lambda pair: pair[0]):
        names.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in component_tensors(tensor):
            values.update(_some_bytes(part))
    levels = [f"{model.objective.sigma_at(share):.6g}" for share in _SHARES]
    return {
        "device": model.device.type,
        "number type": str(model.dtype).removeprefix("torch."),
        "noise": f"{model.objective.sampling} {' '.join(levels)}",
        "layers": names.hexdigest(),
        "weights": values.hexdigest(),
    }


def _named_tensors(network: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(prefix), *network.named_buffers(prefix)]


def _some_bytes(tensor: Tensor) -> bytes:
    """Some of the tensor's numbers, evenly chosen: all of a large model's would take as long as many steps."""
    flat = tensor.detach().flatten()
    chosen = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
    return chosen.view(torch.uint8).numpy().tobytes()
