"""Charts of an inspection, drawn with matplotlib. A new chart is a file here and a row in inspection_charts."""

from __future__ import annotations

from PIL import Image

from ..measure import Inspection, LayerFacts
from .canvas import SIZE, notice
from .layers import layer_map, spectrum_chart
from .overview import rank_chart
from .training import training_chart, trajectory_chart
from .truncation import truncation_chart


def inspection_charts(inspection: Inspection, size: tuple[int, int] = SIZE, dark: bool = False) -> list[Image.Image]:
    """Draw all charts of an inspection, the most telling first.

    Args:
        size: width and height of each chart in pixels.
        dark: light letters on a dark background.

    Returns:
        Spectra, ranks and norms of the layers; with a report also the loss of each truncation, the training loss and
        the restarts. A LoRA without plain LoRA layers gets one image that names what it holds.
    """
    report = inspection.report
    layers = inspection.layers
    charts = _layer_charts(layers, size, dark) if layers else [_without_layers(inspection, size, dark)]
    if report is not None and report.truncations:
        charts.append(truncation_chart(report.truncations, size, dark))
    if report is not None and report.losses:
        steps = len(report.losses)
        charts.append(training_chart(report.losses, steps, report.restarts, report.validation, size, dark, report.fit))
    if report is not None and report.restarts:
        charts.append(trajectory_chart(report, size, dark))
    return charts


def overview_chart(inspection: Inspection, size: tuple[int, int] = SIZE, dark: bool = False) -> Image.Image:
    """Draw the one chart that a node shows: the rank of each block, or what a LoRA without plain layers holds."""
    return rank_chart(inspection.layers, size, dark) if inspection.layers else _without_layers(inspection, size, dark)


def _without_layers(inspection: Inspection, size: tuple[int, int], dark: bool) -> Image.Image:
    kinds = ", ".join(sorted(set(inspection.file.other.values())))
    return notice(f"There is no plain LoRA layer, so there is no spectrum.\nThe file holds: {kinds}.", size, dark)


def _layer_charts(layers: list[LayerFacts], size: tuple[int, int], dark: bool) -> list[Image.Image]:
    spectra = {layer.name: layer.spectrum for layer in layers}
    signal = {layer.name: layer.signal for layer in layers if layer.signal is not None}
    ranks = {layer.name: layer.shown_rank for layer in layers}
    norms = {layer.name: layer.norm for layer in layers}
    rank_title = "Signal rank of each layer" if len(signal) == len(layers) else "Rank that holds 95 % of the energy"
    return [
        spectrum_chart(spectra, signal, size, dark),
        layer_map(ranks, rank_title, size, dark),
        layer_map(norms, "Strength: how much each layer changes", size, dark),
    ]
