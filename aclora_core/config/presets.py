"""Presets: the length of a training by its number of images, and the learning rate by the kind of model.

The lengths rest on drawn images of the tiny base with up to 48 images (bench/README.md, "How many steps for how many
images?"); 4000 is the upper end of what ai-toolkit advises for Flux (config/examples/train_lora_flux_24gb.yaml). The
learning rates are those of other trainers, converted to alpha 8: with AdamW and a fixed alpha the speed follows
learning rate × alpha, whatever the rank (bench/README.md, bench.rank_and_speed). They were not measured here.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Preset = Literal["off", "automatic", "few images", "usual", "many images"]

FEW_STEPS, USUAL_STEPS, MANY_STEPS = 640, 1000, 4000
FEW_IMAGES = 12  # fewer than these are few
STEPS_PER_IMAGE = 40  # of more images than USUAL_STEPS are enough for

LEARNING_RATES = {  # by ComfyUI's class of the model; others keep the default, which was measured with the tiny base
    "SD15": 1e-4,  # sd-scripts, docs/train_network.md: 1e-4 at rank 16; alpha is advised to be half of it
    "SDXL": 2e-4,  # sd-scripts, docs/sdxl_train_network.md: 1e-4 at alpha 16
    "Flux": 2e-4,  # ai-toolkit, config/examples/train_lora_flux_24gb.yaml: 1e-4 at alpha 16
    "ZImage": 4e-4,  # ai-toolkit, the defaults of its new jobs (ui/src/app/jobs/new/jobConfig.ts): 1e-4 at alpha 32
}


def preset_settings(preset: Preset, images: int, model_class: str) -> dict[str, Any]:
    """Return the fields of TrainConfig that a preset sets.

    Args:
        preset: one of the presets; "automatic" follows the number of images.
        images: of the style, each once.
        model_class: ComfyUI's class of the model, such as SDXL.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be {' or '.join(get_args(Preset))}, but is '{preset}'.")
    if preset == "off":
        return {}
    by_number = FEW_STEPS if images < FEW_IMAGES else max(USUAL_STEPS, min(MANY_STEPS, STEPS_PER_IMAGE * images))
    steps = {"few images": FEW_STEPS, "usual": USUAL_STEPS, "many images": MANY_STEPS}.get(preset, by_number)
    rate = LEARNING_RATES.get(model_class)
    return {"steps": steps} | ({} if rate is None else {"learning_rate": rate})
