"""What all benchmarks share: how they time, and what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.files import write_atomically
from experiments.rendering import to_markdown
from experiments.results import write_json


def write_benchmark(
    folder: Path,
    name: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    table: pd.DataFrame,
) -> None:
    """NAME.json with caption, rows and environment, NAME.md with caption and table."""
    write_json(
        folder / f"{name}.json",
        {"caption": caption, "rows": list(rows), "environment": dict(environment)},
    )
    write_atomically(folder / f"{name}.md", f"{caption}\n\n{to_markdown(table)}".encode())
