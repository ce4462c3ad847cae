"""The charts that show an inspection: one size, one theme, most telling first."""

from __future__ import annotations

from PIL import Image

from ..measure import Inspection
from .canvas import notice
from .layers import layer_map, spectrum_chart
from .training import SIZE, training_chart, trajectory_chart
from .truncation import cut_chart


def inspection_charts(inspection: Inspection, size: tuple[int, int] = SIZE, dark: bool = False) -> list[Image.Image]:
    """Spectra, ranks and sizes of the layers; with a report also what cuts lose, the loss and what the restarts kept.

    A LoRA without a plain LoRA layer gets one picture that names what it is made of.
    """
    layers, report = inspection.layers, inspection.report
    pictures = []
    if layers:
        signal = {layer.name: layer.signal for layer in layers if layer.signal is not None}
        pictures.append(spectrum_chart({layer.name: layer.spectrum for layer in layers}, signal, size, dark))
        title = "Signal rank of each layer" if len(signal) == len(layers) else "Components for 95 % of the energy"
        pictures.append(layer_map({layer.name: layer.shown_rank for layer in layers}, title, size, dark))
        norms = {layer.name: layer.norm for layer in layers}
        pictures.append(layer_map(norms, "Strength: how much each layer changes", size, dark))
    else:
        kinds = ", ".join(sorted(set(inspection.file.other.values())))
        pictures.append(notice(f"No plain LoRA layer in it, so there is no spectrum.\nIt holds: {kinds}.", size, dark))
    if report is not None and report.cuts:
        pictures.append(cut_chart(report.cuts, size, dark))
    if report is not None and report.losses:
        steps = len(report.losses)
        pictures.append(training_chart(report.losses, steps, report.restarts, report.validation, size, dark))
    if report is not None and report.restarts:
        pictures.append(trajectory_chart(report, size, dark))
    return pictures
