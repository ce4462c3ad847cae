"""The models that are trained with little free GPU memory, and how much is left free."""

from __future__ import annotations

import torch

from bench.step_time.models import Case, case_named

LIMITS = {  # GiB free
    "sd15": (3.0,),
    "sdxl": (8.0, 6.0),
    "z_image": (8.0,),
    "z_image_fp8": (8.0,),
    "flux": (24.0, 16.0, 12.0),
    "flux_fp8": (12.0, 8.0),
    "qwen_image_fp8": (16.0, 12.0),
}


def case_of(name: str) -> Case:
    """Return the case of a name in LIMITS or of bench.step_time, in its true size."""
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return case_named(name, False, memory)
