"""Node that loads the tiny base model, which ships with the pack."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from . import host

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny_base"
PARTS = ("denoiser", "text_encoder", "autoencoder")


class ACLoRATinyBase(io.ComfyNode):
    """Loads the tiny base model as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ACLoRATinyBase",
            display_name="Load AC-LoRA Tiny Base",
            category="AC-LoRA",
            description="Loads the small icon model that ships with AC-LoRA, so that a style can be learned and drawn "
            "anywhere with nothing to download.",
            search_aliases=["tiny model", "example checkpoint", "test model", "icon model", "load checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Draws icons of 128 × 128 pixels, in the styles noto, twemoji, emojione and fluent.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip='Reads prompts such as "a rocket, noto style". Words it never saw are read in parts.',
                ),
                io.Vae.Output(display_name="vae", tooltip="Turns images into latents of 16 channels and back."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        missing = [part for part in PARTS if not (FOLDER / f"{part}.safetensors").is_file()]
        if missing:
            raise FileNotFoundError(
                f"The tiny base is incomplete: {', '.join(missing)} missing in assets/tiny_base. "
                "Install the pack again."
            )
        model = host.load_tiny_denoiser(FOLDER)
        return io.NodeOutput(model, host.load_tiny_text_encoder(FOLDER), host.load_tiny_autoencoder(FOLDER))
