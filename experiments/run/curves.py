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

from experiments.run.rendering import display, display_words

# Okabe and Ito's colours.
ORANGE, BLUE, GREEN, SKY, BLACK = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#000000"
COLOURS = {"target": ORANGE, "others": BLUE, "general": GREEN}  # by scope
MARKERS = {"target": "o", "others": "s", "general": "^"}
COLUMN, PAGE = 3.3, 6.9  # inches: widths of a paper's column and page
PANELS_PER_ROW = 4
SHAPE = 0.82  # of a panel: height by width
FIXED: dict[str, dict[str, str | None]] = {  # the same bytes every time
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
DPI = 200
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1,
    "lines.markersize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "figure",
}
matplotlib.rcParams.update(STYLE)


def new_canvas(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def new_panels(count: int, *, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of so many empty panels, one as wide as a column, several as a page.

    `shared` panels have the same axes, which are labelled at the figure's left and bottom alone.
    """
    rows = math.ceil(count / PANELS_PER_ROW)
    columns = math.ceil(count / rows)
    width = COLUMN if count == 1 else PAGE
    canvas = new_canvas(width, SHAPE * rows * min(COLUMN, PAGE / columns) + 0.3)
    panels = list(canvas.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
    for above in panels[count - columns : count]:
        above.tick_params(labelbottom=True)
    for unused in panels[count:]:
        unused.set_axis_off()
    return canvas, panels[:count]


def add_legend(canvas: Figure, panel: Axes) -> None:
    """The panel's legend above the figure, off the data."""
    handles, labels = panel.get_legend_handles_labels()
    columns = min(len(labels), 5 if canvas.get_figwidth() > COLUMN else 2)
    canvas.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def save(canvas: Figure) -> dict[str, bytes]:
    """The figure as files, by ending: png, and pdf and svg with text that stays text."""
    files = {}
    for ending, metadata in FIXED.items():
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=ending, dpi=DPI, metadata=metadata)
        files[ending] = buffer.getvalue()
    return files


def draw_ratios(series: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel per configuration, by its title: metric against ratio.

    Frames have the rows of `experiments.run.rendering.tidy`.
    """
    shared = _share(series)
    canvas, panels = new_panels(len(series), shared=shared)
    for panel, (name, group) in zip(panels, series.items(), strict=True):
        _draw(panel, name, group)
        panel.set_ylabel("" if shared else _quantity(group))
    canvas.supxlabel("ratio, % of weights", fontsize="medium")
    if shared:
        canvas.supylabel(_quantity(next(iter(series.values()))), fontsize="medium")
    add_legend(canvas, panels[0])
    return canvas


def draw_edits(series: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel per concept and metric, by its title: a row for each edit, its values with intervals.

    Frames have a row of `experiments.run.rendering.tidy` for each edit and scope.
    """
    canvas, panels = new_panels(len(series), shared=_share(series))
    edits = list(dict.fromkeys(edit for group in series.values() for edit in group["edit"]))
    for panel, (name, group) in zip(panels, series.items(), strict=True):
        for shift, scope in enumerate(COLOURS):
            rows = group[group["scope"] == scope]
            if rows.empty:
                continue
            ends = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            places = [edits.index(edit) + 0.2 * (shift - 0.5) for edit in rows["edit"]]
            style: dict[str, Any] = {"color": COLOURS[scope], "fmt": MARKERS[scope]}
            panel.errorbar(rows["value"], places, xerr=ends, label=scope, **style)
        panel.set_yticks(range(len(edits)), [display(edit) for edit in edits])
        panel.set_ylim(len(edits) - 0.5, -0.5)
        panel.set(title=name, xlabel=_quantity(group))
    add_legend(canvas, panels[0])
    return canvas


def _share(series: Mapping[str, pd.DataFrame]) -> bool:
    """Whether all are of one quantity."""
    return len({_quantity(group) for group in series.values()}) == 1


def _quantity(group: pd.DataFrame) -> str:
    return f"{display_words(group['metric'].iloc[0])}, {group['unit'].iloc[0]}"


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
    panel.tick_params(axis="x", labelrotation=45)
    panel.set_title(name)
    if (group["unit"] == "%").all():
        panel.set_ylim(-3, 103)
