"""Figure 7: accuracy against the ratio of ablated weights, of the target and of the others.

Multiruns of `run.py` end with the same panels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from evaluation.evaluators.base import Metric
from experiments.aggregation import mean_of_groups
from experiments.figures.figure import Drawing, Drawn
from experiments.figures.style import COLOURS, MARKERS, PANEL_SIZE, PANELS_PER_ROW, new_canvas
from experiments.frames import tidy
from experiments.items.item import Place
from experiments.items.plan import Run

CONCEPT = "concept"
SETTINGS = ["ratio", "scope", "state"]


class RatioCurves(Drawing):
    """A panel per concept, and the mean of all where each was run at every ratio."""

    def draw(self, runs: Sequence[tuple[Place, Run]]) -> Drawn:
        frame = pd.concat([tidy(run.folder) for _, run in runs], ignore_index=True)
        series = {
            str(concept).replace("_", " "): group
            for concept, group in frame.groupby(CONCEPT, sort=False)
        }
        means = mean_over_concepts(frame)
        if means is not None:
            series[f"mean of {len(series)}"] = means
            frame = pd.concat([frame, means], ignore_index=True)
        return Drawn(draw_ratios(series), frame)


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


def draw_ratios(series: Mapping[str, pd.DataFrame]) -> Canvas:
    """A panel per configuration, by its title: metric against ratio."""
    columns = min(len(series), PANELS_PER_ROW)
    rows = math.ceil(len(series) / columns)
    canvas = new_canvas(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows)
    panels = canvas.subplots(rows, columns, squeeze=False)
    for panel, (name, group) in zip(panels.flat, series.items(), strict=False):
        _draw(panel, name, group)
    for empty in panels.flat[len(series) :]:
        empty.set_axis_off()
    panels.flat[0].legend(fontsize="small")
    return canvas


def _draw(panel: Axes, name: str, group: pd.DataFrame) -> None:
    for scope in COLOURS:
        rows = group[group["scope"] == scope].sort_values("ratio")
        after = rows[rows["state"] == "after"]
        if after.empty:
            continue
        style: dict[str, Any] = {"color": COLOURS[scope], "marker": MARKERS[scope]}
        percent = 100 * after["ratio"].to_numpy(dtype=float)
        panel.plot(percent, after["value"], label=f"{scope}, after", **style)
        panel.fill_between(percent, after["low"], after["high"], color=style["color"], alpha=0.15)
        for before in rows[rows["state"] == "before"]["value"].head(1):  # paired metrics have none
            panel.axhline(before, color=style["color"], linestyle=":", label=f"{scope}, before")
    panel.set_xscale("log")
    panel.set_xticks(sorted(100 * group["ratio"].unique()))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set(title=name, xlabel="ratio, % of weights", ylabel=_axis_label(group))
    if (group["unit"] == "%").all():
        panel.set_ylim(-3, 103)


def _axis_label(group: pd.DataFrame) -> str:
    return f"{group['metric'].iloc[0].replace('_', ' ')}, {group['unit'].iloc[0]}"


def _metric(row: pd.Series[Any]) -> Metric:
    known = {key: row[key] for key in ("value", "low", "high", "n", "unit", "version")}
    return Metric(name=row["metric"], decimals=1, higher_is_better=True, **known)
