"""JSON files of results, one row a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results atomically as JSON, one row a line."""
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row, separators=(",", ":"), allow_nan=False) for row in results["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    beside.replace(path)


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, as JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value
