"""A compact summary of settings, images and base model, to check that a checkpoint may be resumed.

Images are compared with a tolerance: encoded once more on a GPU they may differ by rounding, while a retouched image or
a changed word differs by far more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..diffusion import DiffusionModel, Objective, TrainingSet, with_timesteps
from ..storage import component_tensors, content_hash, tensors_in
from ..text import name_list

_WITHOUT_EFFECT = {"checkpointing", "gpu_memory", "graph"}  # they change speed and memory only
_SUMS = 8  # numbers that summarise a tensor
_TOLERANCE = 0.02  # of a tensor's root mean square
_SAMPLES = 64  # elements of each weight of the model that are hashed
_NOISE_FRACTIONS = (0.1, 0.5, 0.9)
_NOISE_LEVELS = "timesteps"  # the key of how noise levels are drawn


@dataclass(frozen=True)
class Fingerprint:
    """What a training depends on besides its own state."""

    settings: dict[str, Any]  # of TrainConfig, by name
    pictures: list[list[list[float]]]  # for each image, its variants included, for each of its tensors, a few sums
    model: dict[str, str]  # facts of the base model, by name

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; Fingerprint(**state) reads it again."""
        return {"settings": self.settings, "pictures": self.pictures, "model": self.model}

    @property
    def noise_levels(self) -> tuple[Any, float]:
        """How noise fractions are drawn, and the factor on their odds, as TrainConfig takes them."""
        sampling, odds = self.model[_NOISE_LEVELS].split()
        return sampling, float(odds)

    def checked(self) -> Fingerprint:
        """Return it, after a look at its types.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is damaged.
        """
        tensors = [tensor for image in self.pictures for tensor in image]
        numbers = [self.settings["steps"], *(number for tensor in tensors for number in tensor)]
        texts = [*self.model, *self.model.values()]
        types_fit = all(isinstance(it, int | float) for it in numbers) and all(isinstance(it, str) for it in texts)
        if not types_fit or any(len(tensor) != _SUMS + 2 for tensor in tensors):
            raise ValueError("its summary of images and model is damaged")
        return self


def training_fingerprint(
    model: DiffusionModel, images: TrainingSet, config: TrainConfig, indices: Sequence[int]
) -> Fingerprint:
    """Return the fingerprint of a training that is about to begin. indices: of the images to learn from."""
    settings = {name: value for name, value in asdict(config).items() if name not in _WITHOUT_EFFECT}
    if images.regularisation:  # among the settings, where no difference counts as rounding
        settings["regularisation_weight"] = sorted(set(images.regularisation.values()))
    signs: dict[int, Tensor] = {}
    known: dict[str, list[float]] = {}
    sums = []
    for index in indices:
        for variant in images.variants.get(index, [index]):
            parts = _image_parts(images, variant)
            if config.needs_unconditional:
                parts.append(images.conditioning([images.without_caption[variant]]))
            sums.append([_known_sums(tensor, signs, known) for tensor in tensors_in(parts)])
    facts = _model_facts(model)
    facts[_NOISE_LEVELS] = _noise_levels(with_timesteps(model.objective, config.timesteps, config.timestep_shift))
    return Fingerprint(json.loads(json.dumps(settings)), sums, facts)


def with_noise_levels(now: Fingerprint, before: Fingerprint) -> Fingerprint:
    """Return the fingerprint of a training that goes on with the noise levels that it began with.

    Checkpoints of 0.3.0 do not tell them. They are those that its settings ask for, and where timesteps are automatic,
    those of the model, without a factor on their odds.
    """
    drawn = before.model.get(_NOISE_LEVELS)
    if drawn is None and now.settings.get("timesteps") == "automatic":
        sampling = before.model["noise"].split()[0]
        if sampling != now.noise_levels[0]:
            drawn = f"{sampling} {now.settings['timestep_shift']!r}"
    return now if drawn is None else replace(now, model={**now.model, _NOISE_LEVELS: drawn})


def _noise_levels(objective: Objective) -> str:
    return f"{objective.sampling} {objective.odds!r}"


def _image_parts(images: TrainingSet, index: int) -> list[Any]:
    """Return all tensors of an image: latent, conditioning, and mask where it has one."""
    mask = [images.masks[index]] if index in images.masks else []
    return [images.latents[index], images.conditioning([index]), *mask]


def differences(before: Fingerprint, now: Fingerprint, free: Sequence[str] = ()) -> list[str]:
    """Return every difference in a few words. free: settings that may differ."""
    return [
        *_setting_differences(before.settings, now.settings, free),
        *_image_differences(before.pictures, now.pictures),
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


def _image_differences(before: list[list[list[float]]], now: list[list[list[float]]]) -> Iterator[str]:
    if len(before) != len(now):
        yield f"there were {len(before)} images and now there are {len(now)}"
        return
    pairs = zip(before, now, strict=True)
    changed = [number for number, pair in enumerate(pairs, start=1) if not _alike(*pair)]
    if changed:
        numbers = name_list(changed, 5)
        if len(changed) == 1:
            yield f"image {numbers} of {len(now)} or its caption has changed"
        else:
            yield f"images {numbers} of {len(now)} or their captions have changed"


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
        if name == _NOISE_LEVELS:  # a training goes on with those that it began with
            continue
        if name == "prediction" and name not in before:  # checkpoints of 0.3.0 do not tell it
            continue
        if name == "noise":  # before its levels stands how they were drawn
            old, value = old.partition(" ")[2], value.partition(" ")[2]
        if name in ("layers", "weights") and old != value:
            yield f"the model's {name} have changed"
        elif old != value:
            yield f"the model's {name} was {old} and is {value}"


def _known_sums(tensor: Tensor, signs: dict[int, Tensor], known: dict[str, list[float]]) -> list[float]:
    """Return the sums of a tensor, computed once for equal tensors, as those of an image's repeats.

    A conditioning is a new tensor whenever it is asked for, so its content tells whether it is known.
    """
    key = content_hash(tensor)
    if key not in known:
        known[key] = _sums(tensor, signs)
    return known[key]


def _sums(tensor: Tensor, signs: dict[int, Tensor]) -> list[float]:
    """Return the number of elements, their root mean square, and eight normalised sums with random signs."""
    flat = tensor.detach().flatten().float().cpu()
    count = flat.numel()
    if count not in signs:
        generator = torch.Generator().manual_seed(count)
        signs[count] = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8) * 2 - 1
    padded = torch.nn.functional.pad(flat * signs[count], (0, -count % _SUMS))
    sums = padded.view(-1, _SUMS).sum(0, dtype=torch.float64) / math.sqrt(max(1, count / _SUMS))
    size = float(flat.double().square().mean().sqrt()) if count else 0.0
    return [count, *(float(f"{value:.6g}") for value in [size, *sums.tolist()])]


def _model_facts(model: DiffusionModel) -> dict[str, str]:
    names, values = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    networks = [("", model.network), *model.text_encoders.items()]
    stored = [pair for prefix, part in networks for pair in _named_tensors(part, prefix)]
    for name, tensor in sorted(stored, key=lambda pair: pair[0]):
        names.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in component_tensors(tensor):
            values.update(_some_bytes(part))
    levels = [f"{model.objective.sigma_at(share):.6g}" for share in _NOISE_FRACTIONS]
    return {
        "device": model.device.type,
        "number type": str(model.dtype).removeprefix("torch."),
        "prediction": model.objective.prediction,
        "noise": f"{model.objective.sampling} {' '.join(levels)}",
        "layers": names.hexdigest(),
        "weights": values.hexdigest(),
    }


def _named_tensors(network: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(prefix), *network.named_buffers(prefix)]


def _some_bytes(tensor: Tensor) -> bytes:
    """Return evenly spaced elements as bytes; hashing all of a large model would take as long as many steps."""
    flat = tensor.detach().flatten()
    chosen = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
    return chosen.view(torch.uint8).numpy().tobytes()
