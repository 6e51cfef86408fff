"""Accuracy against the ratio of ablated weights, and how figures look.

Colours are told apart by the colour-blind, markers in print.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours.
ORANGE, BLUE, GREEN, SKY, BLACK = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#000000"
COLOURS = {"target": ORANGE, "others": BLUE, "general": GREEN}  # by scope
MARKERS = {"target": "o", "others": "s", "general": "^"}
PANELS_PER_ROW = 3
PANEL_SIZE = (4.2, 3.4)  # inches
DPI = 150
FIXED = {"png": {"Software": None}, "pdf": {"CreationDate": None}}  # the same bytes every time


def new_canvas(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def new_panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many empty panels, PANELS_PER_ROW in each row."""
    columns = min(count, PANELS_PER_ROW)
    rows = math.ceil(count / columns)
    canvas = new_canvas(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows)
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return canvas, panels[:count]


def save(canvas: Figure) -> dict[str, bytes]:
    """The figure as files, by ending: png, and pdf with text that stays text."""
    files = {}
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for ending, metadata in FIXED.items():
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=ending, dpi=DPI, metadata=metadata)
            files[ending] = buffer.getvalue()
    return files


def draw_ratios(series: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel per configuration, by its title: metric against ratio.

    Frames have the rows of `experiments.run.rendering.tidy`.
    """
    canvas, panels = new_panels(len(series))
    for panel, (name, group) in zip(panels, series.items(), strict=True):
        _draw(panel, name, group)
    panels[0].legend(fontsize="small")
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
    unit = group["unit"].iloc[0]
    label = f"{group['metric'].iloc[0].replace('_', ' ')}, {unit}"
    panel.set(title=name, xlabel="ratio, % of weights", ylabel=label)
    if (group["unit"] == "%").all():
        panel.set_ylim(-3, 103)
