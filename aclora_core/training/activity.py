"""What a training does where that is not a step: before the first one, while it looks at images, and at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Activity = Literal[
    "checkpoint",  # looking for one, and reading it
    "trial step",
    "kernels",  # compiling them, once for each kind of network
    "memory",  # measuring what a step takes
    "first step",  # of a pass, with what is captured in it
    "measuring",  # images at fixed noise
    "previews",
    "truncating",
    "report",
]
OnActivity = Callable[[Activity], None]


def ignore(activity: Activity) -> None:
    """Tell nobody."""
