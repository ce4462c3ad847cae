"""AC-LoRA for ComfyUI: train LoRAs whose rank follows the signal."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    from .nodes import ACLoRAExtension  # imported here, so that tests can import the pack without ComfyUI

    return ACLoRAExtension()
