"""Decomposition of an adapter with a progress bar."""

from __future__ import annotations

from dataclasses import replace

from ...aclora_core.adapter import Adapter, SvdLayer, decompose
from .. import host


def decompose_with_progress(adapter: Adapter, node_id: str | None) -> dict[str, SvdLayer]:
    """Compute the SVD of every layer's delta, one by one, so that the bar moves and a cancel stops it.

    Args:
        node_id: of the node that shows the bar.

    Raises:
        ValueError: a layer holds NaN or infinity; it is named.
    """
    bar = host.ProgressBar(len(adapter.layers), node_id)
    layers: dict[str, SvdLayer] = {}
    for name, layer in adapter.layers.items():
        layers |= decompose(replace(adapter, layers={name: layer}))
        bar.advance(1)
    return layers
