"""Rules that end a training by what was measured at its marks (stop_candidates.py), and what each of them misses.

A rule may read the measures up to the mark where it stops. One that looks for an extremum trains to the end and
returns to it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.eight_styles.scores import Measures, Scores, is_finite
from bench.no_search.tables import markdown
from bench.pool import Row

BLOCKS = ("early", "middle", "late")  # of the denoiser, whose features are compared
_LEVELS = (0.25, 0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.08, 0.06)  # of the training loss
_SHARES = (0.4, 0.3, 0.25, 0.2, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.1)  # of the base's training loss
_FLOORS = (0, 480, 560, 640)  # steps
_DVAR = (0.3, 0.15, 0.05, 0.02)
_RISES = (0.0, 0.005, 0.01, 0.02)
_WEIGHTS = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class WatchedRun:
    """A training with what was measured at its marks.

    Attributes:
        scores: of the images drawn at each mark, by step.
        measures: by step; those of step 0 are the base's.
    """

    scores: Mapping[int, float]
    measures: Mapping[int, Measures]

    @property
    def steps(self) -> list[int]:
        """The marks, ascending."""
        return sorted(self.scores)

    def values(self, measure: str) -> list[float]:
        """Return a measure at every mark."""
        return [self.measures[step][measure] for step in self.steps]

    def regret(self, step: int) -> float:
        """Return what is missed by stopping at a mark: 1 - score / best score of the training."""
        return 1 - self.scores[step] / max(self.scores.values())


Rule = Callable[[WatchedRun], int]  # the mark at which a training stops


def watched_runs(scores: Scores) -> dict[str, list[WatchedRun]]:
    """Return the trainings whose stop was watched, by the name of their line."""
    found: dict[str, list[WatchedRun]] = defaultdict(list)
    for row in scores.rows:
        if "stop" in row and row["style"] in scores.styles and (marks := _marks(row)):
            rated = {int(step): scores.rate(row["style"], row["cells"][step]) for step in marks}
            found[row["name"]].append(WatchedRun(rated, {int(step): row["stop"][step] for step in ("0", *marks)}))
    return dict(found)


def _marks(row: Row) -> list[str]:
    """Return the steps at which everything was measured and finite; a file has None for what is not finite."""
    seen = [step for step, values in row["stop"].items() if None not in values.values()]
    return [step for step in seen if is_finite(row["cells"].get(step, {}))]


# --- rules ---


def after(steps: int) -> Rule:
    """Stop at the mark nearest to a fixed number of steps."""
    return lambda run: min(run.steps, key=lambda step: abs(step - steps))


def at_extremum(rate: Callable[[Measures], float]) -> Rule:
    """Stop where a number of the measures is largest; the first mark of equal ones."""
    return lambda run: max(run.steps, key=lambda step: rate(run.measures[step]))


def below(measure: str, level: float, least: int = 0) -> Rule:
    """Stop at the first mark, from `least` steps on, where a measure is below a level; if it never is, at the last."""
    return lambda run: _first_below(run, measure, level, least)


def below_share(measure: str, share: float, least: int = 0) -> Rule:
    """Stop as `below` does, with a level that is a share of the base's measure."""
    return lambda run: _first_below(run, measure, share * run.measures[0][measure], least)


def _first_below(run: WatchedRun, measure: str, level: float, least: int) -> int:
    low = (step for step in run.steps if step >= least and run.measures[step][measure] < level)
    return next(low, run.steps[-1])


def dvar(measure: str, share: float, window: int = 4) -> Rule:
    """Stop where the variance of the last marks is below a share of the variance of all so far.

    DVAR, Voronov et al. 2023, arXiv 2302.04841, which takes the loss of fixed images, noise and timesteps; there it is
    measured every few steps, here at the marks, with the base's as the first value.
    """

    def stop(run: WatchedRun) -> int:
        values = [run.measures[0][measure]]
        for step, value in zip(run.steps, run.values(measure), strict=True):
            values.append(value)
            enough = len(values) > window
            if enough and statistics.pvariance(values[-window:]) < share * statistics.pvariance(values):
                return step
        return run.steps[-1]

    return stop


def plateau(rate: Callable[[Measures], float], rise: float, patience: int = 3) -> Rule:
    """Stop when the best of the last marks is less than `rise` above the best before them."""

    def stop(run: WatchedRun) -> int:
        values: list[float] = []
        for step in run.steps:
            values.append(rate(run.measures[step]))
            if len(values) > patience and max(values[-patience:]) - max(values[:-patience]) < rise:
                return step
        return run.steps[-1]

    return stop


def rules(steps: Iterable[int]) -> dict[str, Rule]:
    """Return all rules by name; those of fixed steps for the given ones."""
    fixed = {f"{number} steps": after(number) for number in sorted(steps)}
    return {**fixed, **_loss_rules(), **_drawing_rules(), **_weighted_rules()}


def _loss_rules() -> dict[str, Rule]:
    found = {"held-out loss, minimum": at_extremum(_minus("held_out_loss"))}
    found |= {f"training loss, DVAR {share:g}": dvar("training_loss", share) for share in _DVAR}
    for least in _FLOORS:
        floor = f", from {least} steps on" if least else ""
        for level in _LEVELS:
            found[f"training loss below {level:g}{floor}"] = below("training_loss", level, least)
        for share in _SHARES:
            found[f"training loss below {share:g} of the base's{floor}"] = below_share("training_loss", share, least)
    return found


def _drawing_rules() -> dict[str, Rule]:
    found = {}
    for block in BLOCKS:
        for name in ("gained", "centred", "style distance"):
            measure = f"{name.replace(' ', '_')}_{block}"
            rate, extremum = (_minus(measure), "minimum") if "distance" in name else (_plus(measure), "maximum")
            found[f"{name} ({block}), {extremum}"] = at_extremum(rate)
            for rise in _RISES:
                found[f"{name} ({block}), plateau {rise:g}"] = plateau(rate, rise)
    return found


def _weighted_rules() -> dict[str, Rule]:
    return {
        f"gained + {weight:g} · kept ({block}), maximum": at_extremum(_weighted(block, weight))
        for block in BLOCKS
        for weight in _WEIGHTS
    }


def _plus(measure: str) -> Callable[[Measures], float]:
    return lambda measures: measures[measure]


def _minus(measure: str) -> Callable[[Measures], float]:
    return lambda measures: -measures[measure]


def _weighted(block: str, weight: float) -> Callable[[Measures], float]:
    return lambda measures: measures[f"gained_{block}"] + weight * measures[f"kept_{block}"]


# --- their regrets ---


@dataclass(frozen=True)
class Outcome:
    """What a rule misses over the trainings of a line."""

    mean: float  # regret
    worst: float
    steps: float  # mean


def outcome(rule: Rule, runs: Sequence[WatchedRun]) -> Outcome:
    """Return the regrets of a rule over trainings."""
    steps = [rule(run) for run in runs]
    regrets = [run.regret(step) for run, step in zip(runs, steps, strict=True)]
    return Outcome(statistics.fmean(regrets), max(regrets), statistics.fmean(steps))


def stop_table(scores: Scores) -> str:
    """Return the regrets of all rules as a Markdown table, the rule with the lowest mean over the lines first."""
    runs = watched_runs(scores)
    if not runs:
        return "No training was watched, so no rule for the stop can be judged."
    steps = {step for group in runs.values() for run in group for step in run.steps}
    found = {name: [outcome(rule, group) for group in runs.values()] for name, rule in rules(steps).items()}
    order = sorted(found, key=lambda name: _mean_regret(found[name]))
    header = ["", "all lines", *(f"{name} ({len(group)})" for name, group in runs.items())]
    rows = [[name, f"{_mean_regret(found[name]):.1%}", *map(_text, found[name])] for name in order]
    return "\n".join([*_explanation(), "", markdown(header, rows)])


def _mean_regret(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(one.mean for one in outcomes)


def _text(found: Outcome) -> str:
    return f"{found.mean:.1%}, {found.worst:.1%}, {found.steps:.0f}"


def _explanation() -> list[str]:
    return [
        "Regret: 1 - score where the rule stops / best score among the marks of the same training. For each line,",
        "with its number of trainings: mean regret, worst regret, mean step. Losses are at fixed noise; the training",
        "loss is that of the training images. The held-out captions are drawn and compared in features of an early,",
        "middle or late block of the denoiser. Gained: cosine to the held-out image; centred: the same of means over",
        "the tokens, minus the training images' mean; kept: cosine to what the base draws; style distance: between the",
        "means and deviations of the features. Plateau: the best of the last three marks is less than this above the",
        "best before them.",
    ]
