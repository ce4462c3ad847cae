"""Report of a training: losses, restarts, final spectra and truncations.

Nodes hand it on as RANK_REPORT; a saved LoRA file has a compact form in its metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..method import LayerRank, SignalThreshold
from .adapter import Adapter
from .training_facts import FACT_NAMES, Setting, TrainingFacts
from .truncation_loss import TruncationLoss

FORMAT = "aclora rank report 1"


# The header of a LoRA file must stay below 1 MiB, and the keys of 800 layers alone take a third of that.
COMPACT_LOSSES = 500


COMPACT_RANKS = 18_000  # layers × restarts, at up to 27 bytes each


_COMPACT_DIGITS = 4


_MAX_STEPS = 10_000_000  # so that a damaged number cannot ask for all memory


@dataclass(frozen=True)
class Restart:
    """One restart of all layers, and what decided on it."""

    step: int
    epoch: int
    loss: float  # mean since the last restart, relative to predicting the mean target
    threshold: SignalThreshold  # share of the spectrum that is signal, 0 to 1, or "noise floor"
    layers: dict[str, LayerRank]  # by base name, as in Adapter

    def mean_jump(self) -> float | None:
        """Return the mean jump of the layers' deltas, or None if none was measured."""
        jumps = [rank.jump for rank in self.layers.values() if math.isfinite(rank.jump)]
        return math.fsum(jumps) / len(jumps) if jumps else None


@dataclass(frozen=True)
class RankReport:
    """Settings, losses and results of one training."""

    settings: dict[str, Setting]  # the values of TrainConfig, by field name
    losses: list[float]  # of every step
    validation: list[tuple[int, float]]  # step and held-out loss
    restarts: list[Restart]
    spectrum: dict[str, list[float]]  # final singular values of the delta, by base name; empty in the compact form
    signal: dict[str, int]  # final signal rank, by base name
    truncations: list[TruncationLoss] = field(default_factory=list)  # tried; empty without held-out images
    facts: TrainingFacts = TrainingFacts()
    fit: list[tuple[int, float]] = field(default_factory=list)  # step and loss of training images at fixed noise
    tags: dict[str, int] = field(default_factory=dict)  # tag of the captions -> images with it; not in the compact form

    def layer_names(self) -> list[str]:
        """Return the base names of all layers in the report, in their order."""
        known = dict.fromkeys([*self.spectrum, *self.signal])
        return list(known | dict.fromkeys(name for restart in self.restarts for name in restart.layers))

    def settings_and_facts(self) -> dict[str, Setting]:
        """Return the settings and the known facts in one dict, as files store them."""
        return {**self.settings, **self.facts.to_dict()}

    def to_json(self) -> str:
        """Return the whole report as strict JSON; NaN and infinity become null."""
        return _to_json(_rounded(_as_dict(self), None))

    def compact_json(self) -> str:
        """Return the report for a file's metadata: some 450 kB for 800 layers, however long the training was.

        Losses are averaged in up to 500 groups. Many restarts are thinned out evenly; the first and the last stay.
        The spectra are left out, as they follow from the file's own factors, and the tags, as a file's metadata has
        them for all programs. Numbers have four digits.
        """
        groups = _group_means(self.losses, COMPACT_LOSSES)
        most = max(2, COMPACT_RANKS // max(1, len(self.layer_names())))
        chosen = [self.restarts[index] for index in _even_indices(len(self.restarts), most)]
        validation = [self.validation[index] for index in _even_indices(len(self.validation), COMPACT_LOSSES)]
        fit = [self.fit[index] for index in _even_indices(len(self.fit), COMPACT_LOSSES)]
        report = replace(self, losses=groups, validation=validation, fit=fit, restarts=chosen, spectrum={}, tags={})
        return _to_json({**_rounded(_as_dict(report), _COMPACT_DIGITS), "steps": len(self.losses)})

    @classmethod
    def from_json(cls, text: str) -> RankReport:
        """Read the JSON of to_json or compact_json; an averaged loss stands for each of its steps.

        Raises:
            ValueError: the text is no rank report, or a damaged one.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"This is not an AC-LoRA rank report, as it is not JSON ({error}). {_ADVICE}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format", "none") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"This is not an AC-LoRA rank report: its format is '{found}', not '{FORMAT}'. {_ADVICE}")
        try:
            return _from_dict(data)
        except KeyError as error:
            raise ValueError(f"The AC-LoRA rank report is damaged: {error} is missing. {_ADVICE}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"The AC-LoRA rank report is damaged: {error}. {_ADVICE}") from error


_ADVICE = "Use the one that Train AC-LoRA gave."


def recent_loss(losses: Sequence[float]) -> float | None:
    """Return the loss to display: the mean of the last ten steps' finite losses, or None."""
    recent = [loss for loss in losses[-10:] if math.isfinite(loss)]
    return sum(recent) / len(recent) if recent else None


def fit_share(fit: Sequence[tuple[int, float]]) -> float | None:
    """Return the share of the model's own loss of its training images that is left: 1 at the start, 0 at best.

    None where it is not known: the images were not measured before the first step or not since, or a loss is no number.

    Args:
        fit: (step, loss) of training images at fixed noise, in their order.
    """
    if len(fit) < 2 or fit[0][0] != 0 or not fit[0][1] > 0:
        return None
    share = fit[-1][1] / fit[0][1]
    return share if math.isfinite(share) else None


def skipped_steps(losses: Sequence[float]) -> int:
    """Return the number of steps that changed nothing, as their loss or gradient was not finite."""
    return sum(not math.isfinite(loss) for loss in losses)


def _as_dict(report: RankReport) -> dict[str, Any]:
    """Return the layout of the JSON, with floats as they are."""
    names = report.layer_names()
    return {
        "format": FORMAT,
        "settings": report.settings_and_facts(),
        "steps": len(report.losses),
        "losses": report.losses,
        "validation": [[step, loss] for step, loss in report.validation],
        "fit": [[step, loss] for step, loss in report.fit],
        "layers": names,
        "signal": [report.signal.get(name) for name in names],
        "restarts": [_restart_as_dict(restart, names) for restart in report.restarts],
        "spectrum": report.spectrum,
        "cuts": [tried.to_dict() for tried in report.truncations],
        **({"tags": report.tags} if report.tags else {}),
    }


def _restart_as_dict(restart: Restart, names: Sequence[str]) -> dict[str, Any]:
    """Return a restart with one list per quantity, in the order of `names`; null for a layer that it did not see."""
    ranks = [restart.layers.get(name) for name in names]
    quantities = ("kept_down", "kept_up", "kept_delta", "energy", "jump")
    columns = {key: [None if rank is None else getattr(rank, key) for rank in ranks] for key in quantities}
    return {
        "step": restart.step,
        "epoch": restart.epoch,
        "loss": restart.loss,
        "threshold": None if restart.threshold == "noise floor" else restart.threshold,
        **columns,
    }


def _rounded(value: Any, digits: int | None) -> Any:
    """Return nested JSON data with floats rounded to significant digits, and null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")


def _from_dict(data: Mapping[str, Any]) -> RankReport:
    names = [str(name) for name in data["layers"]]
    losses, steps = _floats(data["losses"]), int(data["steps"])
    if not len(losses) <= steps <= _MAX_STEPS:
        raise ValueError(f"it has {len(losses)} losses for {steps} steps")
    return RankReport(
        settings={
            str(key): math.nan if value is None else value
            for key, value in data["settings"].items()
            if key not in FACT_NAMES
        },
        losses=[losses[step * len(losses) // steps] for step in range(steps)] if losses else [],
        validation=[(int(step), _float(loss)) for step, loss in data["validation"]],
        restarts=[_restart_from_dict(names, restart) for restart in data["restarts"]],
        spectrum={str(name): _floats(values) for name, values in data["spectrum"].items()},
        signal={name: int(count) for name, count in zip(names, data["signal"], strict=True) if count is not None},
        truncations=[TruncationLoss.from_dict(tried) for tried in data.get("cuts", [])],  # none before 0.2
        facts=TrainingFacts.from_dict(data["settings"]),
        fit=[(int(step), _float(loss)) for step, loss in data.get("fit", [])],  # none before 0.4
        tags={str(tag): int(count) for tag, count in data.get("tags", {}).items()},
    )


def _restart_from_dict(names: Sequence[str], data: Mapping[str, Any]) -> Restart:
    known = [data[key] for key in ("kept_down", "kept_up", "kept_delta", "energy")]
    jumps = data.get("jump", [None] * len(names))  # reports from before 0.2 have none
    layers = {
        name: LayerRank(int(down), int(up), int(delta), _float(energy), _float(jump))
        for name, down, up, delta, energy, jump in zip(names, *known, jumps, strict=True)
        if down is not None
    }
    threshold: SignalThreshold = "noise floor" if data["threshold"] is None else float(data["threshold"])
    return Restart(int(data["step"]), int(data["epoch"]), _float(data["loss"]), threshold, layers)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _floats(values: Any) -> list[float]:
    return [_float(value) for value in values]


_to_json: Callable[[object], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def _group_means(values: Sequence[float], most: int) -> list[float]:
    """Return the means of up to `most` groups of neighbours; value i is in group i · groups // count."""
    count = len(values)
    groups: list[list[float]] = [[] for _ in range(min(most, count))]
    for index, value in enumerate(values):
        groups[index * len(groups) // count].append(value)
    return [math.fsum(group) / len(group) for group in groups]


def _even_indices(count: int, most: int) -> list[int]:
    """Return up to `most` evenly spaced indices of 0 … count - 1, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [index * (count - 1) // (most - 1) for index in range(most)]


def check_report(adapter: Adapter, report: RankReport) -> None:
    """Check that a report belongs to an adapter: it must have measured each of its layers.

    Raises:
        ValueError: the report is from another training; a layer is named.
    """
    known = report.spectrum.keys()
    unknown = next((base for base in adapter.layers if base not in known), None)
    if known and unknown is not None:
        raise ValueError(
            f"The rank report is from another training: it lacks the layer '{unknown}'. Connect the report of the "
            "node that made this LoRA, or none."
        )


def embedded_report(adapter: Adapter) -> RankReport | None:
    """Return the report in an adapter's metadata, or None if there is none or it does not know all the layers."""
    try:
        report = RankReport.from_json(adapter.metadata["aclora.trajectory"])
    except (KeyError, ValueError):
        return None
    return report if adapter.layers.keys() <= set(report.layer_names()) else None
