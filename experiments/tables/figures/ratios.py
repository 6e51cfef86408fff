"""Figure 7: accuracy against the ratio of ablated weights, of the target and of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from evaluation.evaluators.base import Metric
from experiments.run.curves import draw_ratios
from experiments.run.groups import mean_of_groups
from experiments.run.rendering import display, tidy
from experiments.tables.exhibit import ListedRun
from experiments.tables.figures.drawing import Drawing

CONCEPT = "concept"
SETTINGS = ["ratio", "scope", "state"]


def draw_curves(runs: Sequence[ListedRun]) -> Drawing:
    """A panel per concept, and the mean of all where each was run at every ratio."""
    frame = pd.concat([tidy(run.folder) for run in runs], ignore_index=True)
    series = {display(str(concept)): group for concept, group in frame.groupby(CONCEPT, sort=False)}
    means = mean_over_concepts(frame)
    if means is not None:
        series[f"mean of {len(series)}"] = means
        frame = pd.concat([frame, means], ignore_index=True)
    return Drawing(draw_ratios(series), frame)


def mean_over_concepts(frame: pd.DataFrame) -> pd.DataFrame | None:
    """The means over two or more concepts, at each ratio that all were run at; None without any."""
    count = frame[CONCEPT].nunique()
    rows = []
    for key, group in frame.groupby(SETTINGS, sort=False):
        if len(group) < count or count < 2:
            continue
        mean = mean_of_groups([_metric(row) for _, row in group.iterrows()])
        found = {name: getattr(mean, name) for name in ("value", "low", "high", "n")}
        first = group.iloc[0].to_dict()
        rows.append(first | dict(zip(SETTINGS, key, strict=True)) | found | {CONCEPT: "mean"})
    return pd.DataFrame(rows) if rows else None


def _metric(row: pd.Series[Any]) -> Metric:
    known = {key: row[key] for key in ("value", "low", "high", "n", "unit", "version")}
    return Metric(name=row["metric"], decimals=1, higher_is_better=True, **known)
