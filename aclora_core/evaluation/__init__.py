"""Measures of drawn images: similarity, distances of sets, copies of training images, spread."""

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

__all__ = [
    "DIRECTIONS",
    "Copies",
    "Quality",
    "cmmd",
    "copies",
    "frechet",
    "kid",
    "label_ranks",
    "likeness",
    "nearest_cosines",
    "score",
    "share_within",
    "spread",
    "style_share",
]
