"""Results as tidy data frames, from the files of their folders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from experiments.rendering import join_concepts
from experiments.results import read_json


def tidy(result: Path) -> pd.DataFrame:
    """The target's and the others' metrics of a result, one row each, with their settings."""
    metrics = read_json(result / "metrics.json")
    settings = run_settings(metrics)
    rows = [
        settings
        | {"metric": row["name"], "scope": row["scope"], "state": row["state"]}
        | {key: row[key] for key in ("value", "low", "high", "n", "unit", "version")}
        | {"result": result.name}
        for row in metrics["metrics"]
        if row["scope"] != "group"
    ]
    return pd.DataFrame(rows)


def run_settings(metrics: dict[str, Any]) -> dict[str, Any]:
    """What runs of a sweep differ in, from a result's metrics.json."""
    edit = metrics["edit"]
    return {
        "model": metrics["model"]["name"],
        "concept": join_concepts(metrics),
        "edit": edit["name"],
        "component": edit["component"],
        "ratio": edit["ratio"],
        "per": edit["per"],
        "seed": metrics["seed"],
    }
