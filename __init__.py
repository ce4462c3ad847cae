"""AC-LoRA for ComfyUI: train LoRAs whose rank follows the signal."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint() -> object:
    """Return the extension with the pack's nodes; ComfyUI calls this."""
    from .nodes.compatibility import load_extension  # imported here, so that tests can import the pack without ComfyUI

    return load_extension()
