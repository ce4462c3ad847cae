"""The part of a prompt that every process runs again: the nodes that the model comes from.

Latents, captions and options are values, which the server hands over. A MODEL, a CLIP or a VAE is none: each process
loads its own from the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..options.options import Options

Prompt = Mapping[str, Mapping[str, Any]]  # in API form: node id -> class_type, inputs
Link = list[Any]  # the id of a node and the number of an output of it

_TRAIN = {"ACLoRATrain", "TrainLoraNode"}  # nodes that no process can simply run again
_ADVICE = "Set gpus on AC-LoRA Speed Options to 1"


def links_of(prompt: Prompt, node_id: str | None, chosen: Options) -> dict[str, Link]:
    """Return where the training node's model comes from, and the CLIP and the VAE of its options where it has them.

    Raises:
        ValueError: that is not to be seen in the prompt.
    """
    if node_id is None or node_id not in prompt:
        raise ValueError(
            "A training on several GPUs needs its node in the workflow itself, so that other processes can load the "
            f"model as it does. {_ADVICE}, or take the node out of the loop that makes it."
        )
    inputs = prompt[node_id]["inputs"]
    wanted = {"model": inputs["model"]}
    if chosen.clip is not None:
        wanted["clip"] = _input_of_options(prompt, inputs.get("options"), "ACLoRATextEncoderOptions", "clip")
    if chosen.previews is not None and chosen.previews.vae is not None:
        wanted["vae"] = _input_of_options(prompt, inputs.get("options"), "ACLoRAPreviewOptions", "vae")
    return wanted


def nodes_for(prompt: Prompt, links: Mapping[str, Link]) -> dict[str, dict[str, Any]]:
    """Return the nodes that make what the links bring, as a prompt of their own.

    Raises:
        ValueError: a training is among them.
    """
    found: dict[str, dict[str, Any]] = {}
    open_ids = [str(link[0]) for link in links.values()]
    while open_ids:
        node_id = open_ids.pop()
        if node_id in found:
            continue
        node = prompt[node_id]
        if node["class_type"] in _TRAIN:
            raise ValueError(
                "The model of this training comes from another training, which the processes of several GPUs cannot "
                f"repeat. {_ADVICE}, or save the LoRA of the first training and load it with Load AC-LoRA in a second "
                "workflow."
            )
        found[node_id] = {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
        open_ids += [str(value[0]) for value in node["inputs"].values() if is_link(value)]
    return found


def is_link(value: Any) -> bool:
    """Return whether an input's value comes from another node."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _input_of_options(prompt: Prompt, link: Any, kind: str, name: str) -> Link:
    """Return the link to an input of the last options node of a kind in the chain.

    Raises:
        ValueError: the chain goes through nodes of others.
    """
    while is_link(link) and prompt[link[0]]["class_type"].startswith("ACLoRA"):
        node = prompt[link[0]]
        if node["class_type"] == kind and node["inputs"].get("previews", True) is not False and name in node["inputs"]:
            return list(node["inputs"][name])
        link = node["inputs"].get("options")
    raise ValueError(
        f"A training on several GPUs needs its options nodes connected to each other and to Train AC-LoRA directly, to "
        f"find the {name.upper()}. Take out the nodes between them, or set gpus on AC-LoRA Speed Options to 1."
    )
