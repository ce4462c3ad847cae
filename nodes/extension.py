"""The extension that ComfyUI loads: the list of the pack's nodes."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .adapter.inspect import ACLoRAInspect
from .adapter.load import ACLoRALoad
from .adapter.resize import ACLoRAResize
from .adapter.save import ACLoRASave
from .dataset.node import ACLoRADataset
from .evaluation.node import ACLoRAEvaluate
from .tiny_base import ACLoRATinyBase
from .training.node import ACLoRATrain
from .training.options.checkpoints import ACLoRACheckpointOptions
from .training.options.layers import ACLoRALayerOptions
from .training.options.learning import ACLoRALearningOptions
from .training.options.previews import ACLoRAPreviewOptions
from .training.options.ranks import ACLoRARankOptions
from .training.options.speed import ACLoRASpeedOptions
from .training.options.text_encoder import ACLoRATextEncoderOptions
from .training.options.validation import ACLoRAValidationOptions
from .training.requests import ROUTE, answer


class ACLoRAExtension(ComfyExtension):
    """The extension that ComfyUI loads, with the pack's nodes."""

    async def on_load(self) -> None:
        """Add what the buttons of the training node ask for to ComfyUI's web server."""
        host.add_waiting_route(ROUTE, answer)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes, in the order in which a workflow uses them."""
        return [
            ACLoRATinyBase,
            ACLoRADataset,
            ACLoRATrain,
            ACLoRASave,
            ACLoRALoad,
            ACLoRAInspect,
            ACLoRAResize,
            ACLoRAEvaluate,
            ACLoRALearningOptions,
            ACLoRALayerOptions,
            ACLoRARankOptions,
            ACLoRAValidationOptions,
            ACLoRATextEncoderOptions,
            ACLoRAPreviewOptions,
            ACLoRACheckpointOptions,
            ACLoRASpeedOptions,
        ]
