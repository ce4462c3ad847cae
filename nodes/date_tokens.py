"""Dates in the names of files, as in those of ComfyUI's own nodes that save."""

from __future__ import annotations

import re
from datetime import datetime

# ComfyUI's tokens, and what they stand for.
_TOKENS = {
    "%year%": "%Y",
    "%month%": "%m",
    "%day%": "%d",
    "%hour%": "%H",
    "%minute%": "%M",
    "%second%": "%S",
}

# In the front end's %date:yyyy-MM-dd%, which it replaces for ComfyUI's own nodes only.
_PARTS = {"d": "day", "M": "month", "h": "hour", "m": "minute", "s": "second"}
_PART = re.compile(r"yyyy|yy|dd?|MM?|hh?|mm?|ss?")
_DATE = re.compile(r"%date:([^%]*)%")


def with_dates(name: str, when: datetime | None = None) -> str:
    """Return a name in which %year%, %month%, %day%, %hour%, %minute%, %second% and %date:yyyy-MM-dd% are replaced.

    Args:
        when: the date; now if None.
    """
    now = when or datetime.now()
    for token, code in _TOKENS.items():
        name = name.replace(token, now.strftime(code))
    return _DATE.sub(lambda date: _PART.sub(lambda part: _part(part[0], now), date[1]), name)


def _part(part: str, now: datetime) -> str:
    if part.startswith("y"):
        return str(now.year)[-len(part) :]
    return str(getattr(now, _PARTS[part[0]])).zfill(len(part))
