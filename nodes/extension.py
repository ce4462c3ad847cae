"""The extension that ComfyUI loads: the list of the pack's nodes."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .adapter.inspect import ACLoRAInspect
from .adapter.load import ACLoRALoad
from .adapter.resize import ACLoRAResize
from .adapter.save import ACLoRASave
from .dataset.browser import add_routes
from .dataset.node import ACLoRADataset
from .evaluation.node import ACLoRAEvaluate
from .host import tell_errors
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
        """Add what the dataset's panel and the training node's buttons ask for to ComfyUI's web server."""
        add_routes()
        host.add_command(ROUTE, answer)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes, in the order in which a workflow uses them."""
        nodes: list[type[io.ComfyNode]] = [
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
        return [tell_errors(node) for node in nodes]
