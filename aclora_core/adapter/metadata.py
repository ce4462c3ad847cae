"""Metadata of a LoRA file: kohya's ss_* keys, modelspec 1.0.1, and the settings and trajectory of AC-LoRA."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from io import BytesIO
from itertools import accumulate

from torch import Tensor

from ..storage import to_pil
from ..text import count_noun
from .adapter import Adapter
from .base_models import base_model_names
from .file_formats import FILE_FORMAT, FILE_NAMES
from .header_alpha import PEFT_SETTINGS
from .names import BASE_MODEL
from .rank_report import RankReport, check_report

log = logging.getLogger("aclora")

OURS = "aclora.ranks"  # a key in the metadata of every file that this package writes

# kohya's key -> the setting or fact of the training that it repeats.
KOHYA_SETTINGS = {
    "ss_max_train_steps": "steps",
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "learning_rate",
    "ss_batch_size_per_device": "batch_size",
    "ss_gradient_accumulation_steps": "accumulate",
    "ss_seed": "seed",
    "ss_num_epochs": "epochs",
    "ss_num_train_images": "images",
    "ss_num_reg_images": "regularisation_images",
    "ss_num_validation_images": "held_out_images",
    "ss_optimizer": "optimizer",
    "ss_resolution": "resolution",
    "ss_training_started_at": "started_at",
    "ss_training_finished_at": "finished_at",
}


# Keys of another file that would not be true of the one that is written.
_OUTDATED = {
    *("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", PEFT_SETTINGS, "lora_alpha"),
    *(FILE_FORMAT, FILE_NAMES),
}

# Characters of the metadata that are taken over, the shortest values first, so that the header stays below its limit.
_TAKEN_OVER = 600_000

_TAG_CHARACTERS = 60_000  # of the commonest tags; the header has room for more, and readers have not


def build_metadata(
    adapter: Adapter,
    title: str,
    report: RankReport | None = None,
    trigger: str = "",
    thumbnail: str = "",
    when: datetime | None = None,
) -> dict[str, str]:
    """Build the metadata of a LoRA file; all keys and values are text.

    What the file that the adapter comes from says stays: author, licence, base model, trigger, tags. Only what would no
    longer be true is replaced.

    Args:
        title: the file's name without its ending.
        report: how the adapter was trained. Its settings and facts are stored in "aclora.settings" and, as far as
            other programs know them, in their keys (KOHYA_SETTINGS); the trajectory in "aclora.trajectory".
        trigger: word that calls the style. If empty, that of the file that the adapter comes from, else the report's.
        thumbnail: an image as a data URL.
        when: date of the file; now if None.

    Raises:
        ValueError: the report does not belong to the adapter.
    """
    if report is not None:
        check_report(adapter, report)
    known = _taken_over(adapter.metadata)
    trigger = trigger or known.get("modelspec.trigger_phrase", "") or (report.facts.trigger if report else "")
    metadata = {
        **(_of_a_new_file(title, when) if report is not None and not known else _minimum(title)),
        **known,
        **_of_the_training(report),
        **_of_the_layers(adapter),
        "ss_output_name": title,
    }
    if "modelspec.description" not in known or OURS in known:
        metadata["modelspec.description"] = describe_layers(adapter)
    if known.get("modelspec.title") == known.get("ss_output_name"):  # it is a file's name, and no other title
        metadata["modelspec.title"] = title
    if trigger and trigger != known.get("modelspec.trigger_phrase"):
        metadata["modelspec.trigger_phrase"] = trigger
        metadata["modelspec.usage_hint"] = f"Write '{trigger}' in the prompt."
    if frequency := _tag_frequency(report, trigger, known):
        metadata["ss_tag_frequency"] = frequency
    if thumbnail:
        metadata["modelspec.thumbnail"] = thumbnail
    return metadata


def with_comment(metadata: Mapping[str, str], text: str) -> dict[str, str]:
    """Return metadata whose training comment says what was done to the LoRA, after what it said before."""
    before = metadata.get("ss_training_comment", "")
    return {**metadata, "ss_training_comment": f"{before}; {text}" if before else text}


def _taken_over(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what stays of the metadata of the file that an adapter comes from."""
    kept: dict[str, str] = {}
    left = _TAKEN_OVER
    for key, value in sorted(metadata.items(), key=lambda item: len(item[1])):
        left -= len(key) + len(json.dumps(value))
        if left < 0:
            log.warning("AC-LoRA: '%s' of the LoRA's metadata is too long to be kept: %d characters.", key, len(value))
        elif key not in _OUTDATED:
            kept[key] = value
    return {key: kept[key] for key in metadata if key in kept}


def _minimum(title: str) -> dict[str, str]:
    """Return the keys that other programs want in every file."""
    return {
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_base_model_version": "unknown",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "unknown/lora",
        "modelspec.title": title,
    }


def _of_a_new_file(title: str, when: datetime | None) -> dict[str, str]:
    """Return what says that this package trained the LoRA."""
    return {
        **_minimum(title),
        "ss_training_comment": "AC-LoRA",
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.date": (when or datetime.now(timezone.utc)).isoformat(timespec="seconds"),
    }


def _of_the_training(report: RankReport | None) -> dict[str, str]:
    """Return the settings, the facts and the trajectory of a training."""
    if report is None:
        return {}
    settings = report.settings_and_facts()
    metadata = {key: str(settings[setting]) for key, setting in KOHYA_SETTINGS.items() if setting in settings}
    if "base_model" in settings:
        base_model = base_model_names(str(settings["base_model"]))
        metadata["ss_base_model_version"] = base_model.kohya
        metadata["modelspec.architecture"] = f"{base_model.modelspec}/lora"
        metadata["ss_v2"] = str(settings["base_model"] == "SD20")
        metadata[BASE_MODEL] = str(settings["base_model"])
    if "batch_size" in settings:
        batch, batches = int(str(settings["batch_size"])), int(str(settings.get("accumulate", 1)))
        metadata["ss_total_batch_size"] = str(batch * batches)
    if "resolution" in settings:
        metadata["modelspec.resolution"] = resolution_text(settings["resolution"])
    metadata["ss_steps"] = str(len(report.losses) or settings.get("steps", 0))
    metadata["aclora.settings"] = json.dumps(settings, ensure_ascii=False, sort_keys=True)
    metadata["aclora.trajectory"] = report.compact_json()
    return metadata


def _of_the_layers(adapter: Adapter) -> dict[str, str]:
    """Return the ranks and the alpha; kohya's keys of a file without plain layers stay as they are."""
    ranks = json.dumps([adapter.layers[base].rank for base in sorted(adapter.layers)])
    return {OURS: ranks, **alphas_of_the_layers(adapter)}


def alphas_of_the_layers(adapter: Adapter) -> dict[str, str]:
    """Return kohya's keys for rank and alpha; none for a file without plain layers."""
    metadata = {}
    ranks = {layer.rank for layer in adapter.layers.values()}
    alphas = {layer.alpha for layer in adapter.layers.values()}
    if ranks:
        metadata["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        metadata["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    return metadata


def _tag_frequency(report: RankReport | None, trigger: str, known: Mapping[str, str]) -> str:
    """Return kohya's count of the captions' tags; "" if nothing new is known of them.

    Readers look into the first folder only, and kohya's folder names begin with the repeats.
    """
    tags = _commonest(report.tags) if report is not None else {}
    if not tags and (not trigger or "ss_tag_frequency" in known):
        return ""
    if trigger and trigger not in tags:
        images = report.facts.images if report is not None else None
        tags = {trigger: images or 1, **tags}
    return json.dumps({f"1_{trigger or 'captions'}": tags}, ensure_ascii=False)


def _commonest(tags: Mapping[str, int]) -> dict[str, int]:
    ordered = sorted(tags.items(), key=lambda tag: -tag[1])
    ends = accumulate(len(tag) for tag, _ in ordered)
    return {tag: count for (tag, count), end in zip(ordered, ends, strict=True) if end <= _TAG_CHARACTERS}


def resolution_text(resolution: object) -> str:
    """Return a resolution in modelspec's spelling: 512 and "512" become "512x512", "512x768" stays."""
    text = str(resolution)
    return f"{text}x{text}" if text.isdecimal() else text


def thumbnail_url(image: Tensor, side: int = 256) -> str:
    """Encode an image as a JPEG data URL of some 10 to 20 kB, for the model library.

    Args:
        image: (height, width, channels) or (batch, height, width, channels), of which the first is taken; values from 0
            to 1. One or two channels are grey, without and with alpha.
        side: largest width and height in pixels.

    Raises:
        ValueError: it has no pixels.
    """
    if image.ndim not in (3, 4) or image.numel() == 0:
        raise ValueError(f"it is not an image, but has the shape {' × '.join(map(str, image.shape))}")
    pixels = image[0] if image.ndim == 4 else image
    thumbnail = to_pil(pixels)
    thumbnail.thumbnail((side, side))
    buffer = BytesIO()
    thumbnail.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def describe_layers(adapter: Adapter) -> str:
    """Return the number of plain LoRA layers and their ranks in words."""
    if not adapter.layers:
        return "no plain LoRA layers"
    return f"{count_noun(len(adapter.layers), 'LoRA layer')}, {rank_text(adapter)}"


def rank_text(adapter: Adapter) -> str:
    """Return the ranks of the plain LoRA layers, of which there is at least one: "rank 4", "ranks 2 to 8"."""
    ranks = [layer.rank for layer in adapter.layers.values()]
    return f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
