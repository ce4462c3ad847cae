"""The results as Markdown: every cell, the verdict, and the styles one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from aclora_core.text import count_noun
from bench.eight_styles.scores import Cell, Measures, Scores
from bench.eight_styles.verdict import DEFAULT, Verdict, verdict
from bench.no_search.tables import markdown

# The aims of the default.
BEHIND_STYLE, WORST_BEHIND_STYLE, AHEAD_OF_MEDIAN = 0.02, 0.05, 0.09
CONCEPT_BEHIND, FILE_SHARE = 0.02, 0.5

_COLUMNS = {  # heading -> measure and format
    "style": ("style", ".3f"),
    "concept in five": ("concept_in_five", ".3f"),
    "likeness, icons": ("likeness_icons", ".3f"),
    "likeness, photos": ("likeness_photos", ".3f"),
    "Fréchet, icons": ("frechet_icons", ".1f"),
    "Fréchet, photos": ("frechet_photos", ".1f"),
    "KID, photos": ("kid_photos", ".4f"),
    "copies": ("copies_share_photos", ".3f"),
    "spread": ("spread_photos", ".3f"),
    "mean rank": ("mean_rank", ".1f"),
}
_GROUPS = ("base", "real", "vae", "grid", "library", "training")
_AFTER_ALL_STEPS = 10**9


def report(scores: Scores, facts: Mapping[str, Any], candidate: Cell = DEFAULT) -> str:
    """Return all tables as Markdown.

    Args:
        scores: of the rows.
        facts: of the run: device and date.
        candidate: the cell that is compared with the grid.
    """
    found = verdict(scores, candidate)
    parts = [failures(scores), cell_table(scores, facts, candidate)]
    if found is None:
        parts.append("No cell of the grid was measured in all styles, so there is no verdict.")
    else:
        parts.append("\n".join(verdict_lines(found)))
    parts.append(style_table(scores, found))
    return "\n\n".join(part for part in parts if part)


def cell_table(scores: Scores, facts: Mapping[str, Any], candidate: Cell = DEFAULT) -> str:
    """Return the table of all cells that were measured in every style; the candidate's line comes last."""
    header = ["", "runs", "score", "over seeds", *_COLUMNS, "file, MB"]
    rows = [_cell_row(scores, cell) for cell in in_order(scores, candidate.name)]
    run = ", ".join(str(facts[name]) for name in ("device", "date") if name in facts)
    lines = [
        f"{count_noun(len(scores.styles), 'style')}{f' ({run})' if run else ''}.",
        "Score: mean ratio of style, concept in five, likeness"
        f' and inverted Fréchet distance to "{scores.reference}"; over seeds: its standard deviation.',
        "Style, concept in five: shares of the drawn images. Icons, photos: by the classifier of the icons, and by",
        "EfficientNet. Copies: share of the drawn images that are nearer to a training image than to every real one.",
    ]
    return "\n".join(lines) + "\n\n" + markdown(header, rows)


def in_order(scores: Scores, last: str) -> list[Cell]:
    """Return the cells as the table has them: base, real images, grid, libraries, other trainings, the last line."""
    return sorted(scores.cells, key=lambda cell: _place(scores, cell, last))


def _place(scores: Scores, cell: Cell, last: str) -> tuple[int, ...]:
    """Return what the cells are sorted by; within a group, only the grid changes the order of the file."""
    if cell.name == last:
        return (len(_GROUPS),)
    if not scores.in_grid(cell.name):
        return (_GROUPS.index(scores.kinds[cell.name]),)
    rank = int(cell.name.split()[1])
    return _GROUPS.index("grid"), rank, int(cell.step) if cell.step.isdigit() else _AFTER_ALL_STEPS


def _cell_row(scores: Scores, cell: Cell) -> list[str]:
    measures = scores.mean(cell)
    size = _number(measures.get("bytes", math.nan) / 1e6, ".2f")
    values = [_number(measures.get(name, math.nan), form) for name, form in _COLUMNS.values()]
    score, spread = _number(scores.score(cell), ".3f"), _number(scores.spread_over_seeds(cell), ".3f")
    return [str(cell), str(scores.runs(cell)), score, spread, *values, size]


def verdict_lines(found: Verdict) -> list[str]:
    """Return what the grid reaches, and the candidate's comparison with it and with the aims."""
    scores = found.scores
    lines = ["The grid with hindsight:", ""]
    lines += [f"- best cell: {_rated(scores, found.best)}"]
    lines += [f"- each style's own best cell: {found.score_of_best:.3f}"]
    lines += [f"- median cell: {_rated(scores, found.median)}"]
    if found.best_library:
        lines += [f"- best library: {_rated(scores, found.best_library)}"]
    if found.candidate is None:
        return [*lines, "", "The default was not measured in all styles."]
    comparison = [*_against_scores(found, found.candidate), *_against_best(found, found.candidate)]
    return [*lines, "", f"{_rated(scores, found.candidate)}, against them:", "", *comparison]


def _against_scores(found: Verdict, cell: Cell) -> list[str]:
    to_best, to_median = found.ratio(cell, found.best), found.ratio(cell, found.median)
    regrets = found.regrets(cell)
    mean, worst = statistics.fmean(regrets.values()), max(regrets, key=lambda style: regrets[style])
    lines = [
        f"- best cell: {to_best:.3f} times its score; aim: 1: {_met(to_best >= 1)}",
        f"- each style's own best cell: {_behind(mean)} on average; aim: at most {BEHIND_STYLE:.0%} behind: "
        f"{_met(mean <= BEHIND_STYLE)}",
        f"- the worst style, {worst}: {_behind(regrets[worst])}; aim: at most {WORST_BEHIND_STYLE:.0%} behind: "
        f"{_met(regrets[worst] <= WORST_BEHIND_STYLE)}",
        f"- median cell: {to_median:.3f} times its score; aim: {1 + AHEAD_OF_MEDIAN}: "
        f"{_met(to_median >= 1 + AHEAD_OF_MEDIAN)}",
    ]
    if found.best_library:
        ratio = found.ratio(cell, found.best_library)
        lines.append(f"- best library: {ratio:.3f} times its score; aim: above 1: {_met(ratio > 1)}")
    return lines


def _against_best(found: Verdict, cell: Cell) -> list[str]:
    own, best = found.scores.mean(cell), found.scores.mean(found.best)
    concept = own["concept_in_five"] - best["concept_in_five"]
    lines = [
        f"- concept in five: {concept:+.3f} to the best cell's; aim: at least {-CONCEPT_BEHIND}: "
        f"{_met(concept >= -CONCEPT_BEHIND)}"
    ]
    lines += [_copies("copies_share", "share of copies", own, best)]
    lines += [_copies("copies_drawn", "cosine to the nearest training image", own, best)]
    if "bytes" in own and "bytes" in best:
        share = own["bytes"] / best["bytes"]
        lines.append(
            f"- file: {share:.2f} times the best cell's; aim: at most {FILE_SHARE}: {_met(share <= FILE_SHARE)}"
        )
    return lines


def _copies(measure: str, name: str, own: Measures, best: Measures) -> str:
    change = own[f"{measure}_photos"] - best[f"{measure}_photos"]
    return f"- {name}: {change:+.3f} to the best cell's; aim: not above it: {_met(change <= 0)}"


def style_table(scores: Scores, found: Verdict | None) -> str:
    """Return score, style and concept in five by style: base, reference, best cells, candidate and its regret."""
    columns = {cell.name: cell for cell in scores.cells if scores.kinds[cell.name] == "base"}
    columns |= {str(scores.reference): scores.reference}
    if found:
        columns |= {f"best cell ({found.best})": found.best}
    else:
        columns |= {f"best cell ({best})": best for best in [_best_trained(scores)]}
    if found and found.candidate:
        columns |= {str(found.candidate): found.candidate}
    header = ["score / style / concept in five", *columns]
    rows = [[style, *(_triple(scores, cell, style) for cell in columns.values())] for style in scores.styles]
    if found:
        header += ["own best cell", "", *([f"{found.candidate} to it"] if found.candidate else [])]
        for style, row in zip(scores.styles, rows, strict=True):
            row += _own_best(found, style)
    return "By style\n\n" + markdown(header, rows)


def _best_trained(scores: Scores) -> Cell:
    trained = [cell for cell in scores.cells if scores.kinds[cell.name] in ("library", "training")]
    return max(trained, key=scores.score)


def _own_best(found: Verdict, style: str) -> list[str]:
    best = found.best_of_style[style]
    cells = [str(best), _triple(found.scores, best, style)]
    return [*cells, _behind(found.regrets(found.candidate)[style])] if found.candidate else cells


def _triple(scores: Scores, cell: Cell, style: str) -> str:
    measures = scores.of_style(cell, style)
    return f"{scores.style_score(cell, style):.3f} / {measures['style']:.3f} / {measures['concept_in_five']:.3f}"


def failures(scores: Scores) -> str:
    """Return a list of the jobs that failed, and of the cells that lack styles."""
    lines = [f"- {row['name']}, {row['style']}, seed {row['seed']}: {row['error']}" for row in scores.errors]
    for cell, count in scores.incomplete().items():
        lines.append(f"- {cell}: measured in {count} of {len(scores.styles)} styles")
    return "\n".join(["Failed or incomplete, and not in the tables:", "", *lines]) if lines else ""


def _rated(scores: Scores, cell: Cell) -> str:
    return f"{cell}: {scores.score(cell):.3f}"


def _number(value: float, form: str) -> str:
    if math.isinf(value):
        return "∞"
    return "" if math.isnan(value) else format(value, form)


def _behind(regret: float) -> str:
    return f"{regret:.1%} behind" if regret >= 0 else f"{-regret:.1%} ahead"


def _met(yes: bool) -> str:
    return "met" if yes else "not met"
