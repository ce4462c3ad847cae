"""Names of base models in the metadata of LoRA files. A new model family gets a row here."""

from __future__ import annotations

from typing import NamedTuple


class BaseModelNames(NamedTuple):
    """Names of one base model for programs that read LoRA files."""

    kohya: str  # for ss_base_model_version
    modelspec: str  # for modelspec.architecture, without "/lora"


# By ComfyUI's class of the model (comfy.supported_models).
BASE_MODELS = {
    "SD15": BaseModelNames("sd_v1", "stable-diffusion-v1"),
    "SD20": BaseModelNames("sd_v2", "stable-diffusion-v2-512"),
    "SDXL": BaseModelNames("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SD3": BaseModelNames("sd3", "stable-diffusion-3"),
    "Flux": BaseModelNames("flux1", "flux-1-dev"),
    "FluxSchnell": BaseModelNames("flux1", "flux-1-schnell"),
    "Lumina2": BaseModelNames("lumina2", "lumina-2"),
}


def base_model_names(model_class: str) -> BaseModelNames:
    """Return the names of a base model; the class in lower case for a model without a row."""
    unknown = BaseModelNames(model_class.lower(), model_class.lower())
    return BASE_MODELS.get(model_class, unknown)
