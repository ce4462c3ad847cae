"""Measures of drawn images with their errors, and the verdict: similarity, distances of sets, copies, spread."""

from .estimate import Estimate, estimate
from .evaluate import Evaluation, ImageFeatures, Nearest, Neighbour, Row, evaluate, scores_row
from .measures import (
    DIRECTIONS,
    Copies,
    Quality,
    cmmd,
    copies,
    frechet,
    kid,
    label_ranks,
    likeness,
    nearest_cosines,
    score,
    share_within,
    spread,
    style_share,
)
from .report import evaluation_json, evaluation_lines, evaluation_table, verdict

__all__ = [
    "DIRECTIONS",
    "Copies",
    "Estimate",
    "Evaluation",
    "ImageFeatures",
    "Nearest",
    "Neighbour",
    "Quality",
    "Row",
    "cmmd",
    "copies",
    "estimate",
    "evaluate",
    "evaluation_json",
    "evaluation_lines",
    "evaluation_table",
    "frechet",
    "kid",
    "label_ranks",
    "likeness",
    "nearest_cosines",
    "score",
    "scores_row",
    "share_within",
    "spread",
    "style_share",
    "verdict",
]
