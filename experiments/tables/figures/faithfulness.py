"""What scores are worth: accuracy against the share of weights that they chose, beside controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.integrate import trapezoid

from evaluation.evaluators.base import Interval, bootstrap_mean
from experiments.run.curves import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    add_legend,
    new_panels,
)
from experiments.run.rendering import DASH, display, display_words, tidy
from experiments.tables.exhibit import ListedRun
from experiments.tables.figures.drawing import Drawing
from experiments.tables.figures.ratios import CONCEPT, mean_over_concepts

SCORES = "scores"  # the axis of what chose the weights
SCOPES = {"target": "the class ↓", "others": "the other classes ↑"}
LINES = [(ORANGE, "o"), (BLUE, "s"), (GREEN, "^"), (SKY, "v"), (BLACK, "x"), ("0.6", "+")]


def draw_faithfulness(runs: Sequence[ListedRun]) -> Drawing:
    """A panel for the class and one for the others, a line for each choice: means over concepts.

    The axis "scores" has the choices. The table has the areas under each concept's curve, over the
    logarithm of the share and divided by its span, so in the metric's unit; means over concepts.
    """
    frame = pd.concat(
        [tidy(run.folder).assign(**{SCORES: run.place[SCORES]}) for run in runs], ignore_index=True
    )
    frame = frame[frame["metric"] == frame["metric"].iloc[0]]
    canvas, panels = new_panels(len(SCOPES), shared=True)
    for panel, (scope, name) in zip(panels, SCOPES.items(), strict=True):
        _draw(panel, frame[frame["scope"] == scope])
        panel.set_title(name)
    add_legend(canvas, panels[0])
    says = [
        "Area: of a concept's curve over the logarithm of the share, divided by its span; mean and "
        "95 % interval (percentile bootstrap) over the concepts that were run at every share."
    ]
    return Drawing(canvas, frame, says, areas(frame[frame["state"] == "after"]))


def areas(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each choice: areas of the class and of the others, and how far these lie apart."""
    unit, ratios = frame["unit"].iloc[0], frame["ratio"].nunique()
    rows = []
    for scores, found in frame.groupby(SCORES, sort=False):
        wide = found.pivot_table("value", [CONCEPT, "ratio"], "scope").dropna()
        curves = {name: each.droplevel(0) for name, each in wide.groupby(level=0)}
        whole = [each for each in curves.values() if len(each) == ratios > 1]
        target, others = ([area(each[scope]) for each in whole] for scope in SCOPES)
        apart = [high - low for low, high in zip(target, others, strict=True)]
        cells = [DASH if not each else _cell(bootstrap_mean(each)) for each in (target, others)]
        cells.append(_cell(bootstrap_mean(apart)) if apart else DASH)
        rows.append([display(str(scores)), *cells, str(len(whole))])
    heads = [f"area, {name}, {unit}" for name in SCOPES.values()]
    return pd.DataFrame(rows, columns=["weights by", *heads, "others - class ↑", "concepts"])


def area(curve: pd.Series[float]) -> float:
    """The mean height of a curve over log(ratio), its index, by trapezia."""
    at = np.log(curve.index.to_numpy(dtype=float))
    return float(trapezoid(curve.to_numpy(dtype=float), at) / (at[-1] - at[0]))


def _draw(panel: Axes, frame: pd.DataFrame) -> None:
    before, after = (frame[frame["state"] == state] for state in ("before", "after"))
    unedited = before.groupby(CONCEPT)["value"].first().mean()
    panel.axhline(unedited, color="0.5", linestyle=":", label="unedited")
    lines = zip(after.groupby(SCORES, sort=False), LINES, strict=False)
    for (scores, found), (colour, marker) in lines:
        means = mean_over_concepts(found)
        rows = (found if means is None else means).sort_values("ratio")
        percent = 100 * rows["ratio"].to_numpy(dtype=float)
        name = display(str(scores))
        panel.plot(percent, rows["value"], color=colour, marker=marker, label=name)
        panel.fill_between(percent, rows["low"], rows["high"], color=colour, alpha=0.1)
    panel.set_xscale("log")
    panel.set_xticks(sorted(100 * frame["ratio"].unique()))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    metric, unit = display_words(frame["metric"].iloc[0]), frame["unit"].iloc[0]
    panel.set(xlabel="zeroed weights, %", ylabel=f"{metric}, {unit}")
    panel.label_outer(remove_inner_ticks=False)


def _cell(mean: Interval) -> str:
    return f"{mean.value:.1f} [{mean.low:.1f}, {mean.high:.1f}]"
