"""The nodes that ComfyUI shows under "AC-LoRA"."""

from comfy_api.latest import ComfyExtension, io

from .dataset import ACLoRADataset
from .inspection import ACLoRAInspect
from .loading import ACLoRALoad
from .options.checkpoints import ACLoRACheckpointOptions
from .options.layers import ACLoRALayerOptions
from .options.learning import ACLoRALearningOptions
from .options.previews import ACLoRAPreviewOptions
from .options.ranks import ACLoRARankOptions
from .options.speed import ACLoRASpeedOptions
from .options.text_encoder import ACLoRATextEncoderOptions
from .options.validation import ACLoRAValidationOptions
from .resizing import ACLoRAResize
from .saving import ACLoRASave
from .tiny_base import ACLoRATinyBase
from .train import ACLoRATrain


class ACLoRAExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes, in the order in which a workflow uses them."""
        return [
            ACLoRATinyBase, ACLoRADataset, ACLoRATrain, ACLoRASave, ACLoRALoad, ACLoRAInspect, ACLoRAResize,
            ACLoRALearningOptions, ACLoRALayerOptions, ACLoRARankOptions, ACLoRAValidationOptions,
            ACLoRATextEncoderOptions, ACLoRAPreviewOptions, ACLoRACheckpointOptions, ACLoRASpeedOptions,
        ]  # fmt: skip
