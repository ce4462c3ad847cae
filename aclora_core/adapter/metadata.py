"""Metadata of a LoRA file: kohya's ss_* keys, modelspec 1.0.1, and the settings and trajectory of AC-LoRA."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from io import BytesIO

from PIL import Image
from torch import Tensor

from .adapter import Adapter
from .base_models import base_model_names
from .rank_report import RankReport, check_report

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


def build_metadata(
    adapter: Adapter,
    title: str,
    report: RankReport | None = None,
    trigger: str = "",
    thumbnail: str = "",
    when: datetime | None = None,
) -> dict[str, str]:
    """Build the metadata of a LoRA file; all keys and values are text.

    Args:
        title: the file's name without its ending.
        report: how the adapter was trained. Its settings and facts are stored in "aclora.settings" and, as far as
            other programs know them, in their keys (KOHYA_SETTINGS); the trajectory in "aclora.trajectory".
        trigger: word that calls the style; the report's if empty.
        thumbnail: an image as a data URL.
        when: date of the file; now if None.

    Raises:
        ValueError: the report does not belong to the adapter.
    """
    settings = report.settings_and_facts() if report is not None else {}
    if report is not None:
        check_report(adapter, report)
    trigger = trigger or str(settings.get("trigger", ""))
    base_model = base_model_names(str(settings.get("base_model", "unknown")))
    date = (when or datetime.now(timezone.utc)).isoformat(timespec="seconds")
    metadata = {
        **_kohya(adapter, title, settings, trigger),
        "ss_base_model_version": base_model.kohya,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base_model.modelspec}/lora",
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": title,
        "modelspec.date": date,
        "modelspec.description": describe_layers(adapter),
        "aclora.ranks": json.dumps([adapter.layers[base].rank for base in sorted(adapter.layers)]),
    }
    if "resolution" in settings:
        metadata["modelspec.resolution"] = resolution_text(settings["resolution"])
    if trigger:
        metadata["modelspec.trigger_phrase"] = trigger
        metadata["modelspec.usage_hint"] = f"Write '{trigger}' in the prompt."
    if thumbnail:
        metadata["modelspec.thumbnail"] = thumbnail
    if report is not None:
        metadata["ss_steps"] = str(len(report.losses) or settings.get("steps", 0))
        metadata["aclora.settings"] = json.dumps(settings, ensure_ascii=False, sort_keys=True)
        metadata["aclora.trajectory"] = report.compact_json()
    return metadata


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
        raise ValueError(f"it is no image, but of shape {' × '.join(map(str, image.shape))}")
    pixels = image[0] if image.ndim == 4 else image
    colors = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].expand(-1, -1, 3)
    array = (colors.detach().cpu().float().nan_to_num().clamp(0, 1) * 255).round().byte().numpy()
    thumbnail = Image.fromarray(array)
    thumbnail.thumbnail((side, side))
    buffer = BytesIO()
    thumbnail.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def describe_layers(adapter: Adapter) -> str:
    """Return the number of plain LoRA layers and their ranks in words."""
    ranks = [layer.rank for layer in adapter.layers.values()]
    if not ranks:
        return "no plain LoRA layers"
    spread = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    return f"{len(ranks)} LoRA layer{'s' if len(ranks) > 1 else ''}, {spread}"


def _kohya(adapter: Adapter, title: str, settings: Mapping[str, object], trigger: str) -> dict[str, str]:
    """Return kohya's minimum of keys, and of the others those that are known."""
    ranks = {layer.rank for layer in adapter.layers.values()}
    alphas = {layer.alpha for layer in adapter.layers.values()}
    metadata = {
        "ss_output_name": title,
        "ss_v2": str(settings.get("base_model") == "SD20"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
        "ss_training_comment": "AC-LoRA",
    }
    metadata |= {key: str(settings[setting]) for key, setting in KOHYA_SETTINGS.items() if setting in settings}
    if "batch_size" in settings:
        batch, batches = int(str(settings["batch_size"])), int(str(settings.get("accumulate", 1)))
        metadata["ss_total_batch_size"] = str(batch * batches)
    if trigger:
        # Readers look into the first folder only, and kohya's folder names begin with the repeats.
        frequency = {f"1_{trigger}": {trigger: settings.get("images", 1)}}
        metadata["ss_tag_frequency"] = json.dumps(frequency, ensure_ascii=False)
    return metadata
