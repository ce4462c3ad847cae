"""Names of layers in the formats of LoRA files: ComfyUI's, kohya's and diffusers'."""

from .families import BASE_MODEL, Family, FileFormat, base_model_of, family_of
from .rule import COMFYUI_MODEL, COMFYUI_TEXT, Match

__all__ = [
    "BASE_MODEL",
    "COMFYUI_MODEL",
    "COMFYUI_TEXT",
    "Family",
    "FileFormat",
    "Match",
    "base_model_of",
    "family_of",
]
