"""What scores are worth: accuracy against the share of weights that they chose, beside controls.

And of runs with `effect.seeds`: the change of J that the scores predict for their choice beside the
measured one, and how much of the choice scores of other seeds have in common with it.
"""

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
    COLUMN,
    GREEN,
    ORANGE,
    PAGE,
    SKY,
    add_legend,
    new_canvas,
    new_panels,
)
from experiments.run.rendering import DASH, display, display_words, join_concepts, tidy
from experiments.run.results import read_json
from experiments.tables.exhibit import ListedRun
from experiments.tables.figures.drawing import Drawing
from experiments.tables.figures.ratios import CONCEPT, mean_over_concepts

SCORES = "scores"  # the axis of what chose the weights
SCOPES = {"target": "the class ↓", "others": "the other classes ↑"}
HEADINGS = {  # columns of the table on J
    "measured / predicted change of J, %": "part",
    "choice in common with other seeds', %": "overlap",
}
LINES = [(ORANGE, "o"), (BLUE, "s"), (GREEN, "^"), (SKY, "v"), (BLACK, "x"), ("0.6", "+")]


def draw_faithfulness(runs: Sequence[ListedRun]) -> Drawing:
    """A panel for the class and one for the others, a line for each choice: means over concepts.

    The axis "scores" has the choices. The table has the areas under each concept's curve, over the
    logarithm of the share and divided by its span, so in the metric's unit; means over concepts.
    Two more panels and columns where runs have told of J.
    """
    frame = pd.concat(
        [tidy(run.folder).assign(**{SCORES: run.place[SCORES]}) for run in runs], ignore_index=True
    )
    frame = frame[frame["metric"] == frame["metric"].iloc[0]]
    told = effects(runs)
    if told.empty:
        canvas, panels = new_panels(len(SCOPES), shared=True)
    else:
        canvas = new_canvas(PAGE, 2 * COLUMN)
        panels = list(canvas.subplots(2, len(SCOPES)).flat)
        panels[1].sharey(panels[0])
    for panel, (scope, name) in zip(panels, SCOPES.items(), strict=False):
        _draw(panel, frame[frame["scope"] == scope])
        panel.set_title(name)
    add_legend(canvas, panels[0])
    says = [
        "Area: of a concept's curve over the logarithm of the share, divided by its span; mean and "
        "95 % interval (percentile bootstrap) over the concepts that were run at every share."
    ]
    table = areas(frame[frame["state"] == "after"])
    if told.empty:
        return Drawing(canvas, frame, says, table)
    _draw_effects(panels[2], panels[3], told)
    for column, cells in effect_cells(told).items():
        table[column] = [cells.get(choice, DASH) for choice in table["weights by"]]
    keys = [CONCEPT, SCORES, "ratio"]
    says.append(
        "J: of the concept, on noise that the scores have not seen, means over concepts and "
        "further seeds; columns from the smallest share to the largest."
    )
    return Drawing(canvas, frame.merge(told, "left", keys), says, table)


def effects(runs: Sequence[ListedRun]) -> pd.DataFrame:
    """A row for each run with `effect.seeds`: changes of J, in % of J, and the overlap, in %."""
    rows = []
    for run in runs:
        metrics = read_json(run.folder / "metrics.json")
        effect = metrics["effect"] or {}
        if "seeds" in effect:
            whole = effect["unedited"]
            shares = {name: 100 * effect[name] / whole for name in ("predicted", "measured")}
            place = {CONCEPT: join_concepts(metrics), "ratio": metrics["edit"]["ratio"]}
            shares["overlap"] = 100 * effect["overlap"]
            rows.append({**place, SCORES: run.place[SCORES], **shares})
    return pd.DataFrame(rows)


def effect_cells(told: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Columns of the table by heading, each with a cell for the choices that have one."""
    means = told.groupby([SCORES, "ratio"], sort=False)[["predicted", "measured", "overlap"]].mean()
    means["part"] = 100 * means["measured"] / means["predicted"]
    columns: dict[str, dict[str, str]] = {heading: {} for heading in HEADINGS}
    for scores, found in means.groupby(level=SCORES, sort=False):
        ends = found.sort_index(level="ratio").iloc[[0, -1]]
        for heading, key in HEADINGS.items():
            columns[heading][display(str(scores))] = " to ".join(f"{x:.0f}" for x in ends[key])
    return columns


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
    metric, unit = display_words(frame["metric"].iloc[0]), frame["unit"].iloc[0]
    _label(panel, frame["ratio"], f"{metric}, {unit}")


def _draw_effects(changes: Axes, shared: Axes, told: pd.DataFrame) -> None:
    lines = zip(told.groupby(SCORES, sort=False), LINES, strict=False)
    for (scores, found), (colour, marker) in lines:
        means = found.groupby("ratio")[["predicted", "measured", "overlap"]].mean()
        percent, name = 100 * means.index.to_numpy(dtype=float), display(str(scores))
        for key, style in (("predicted", ":"), ("measured", "-")):
            label = f"{name}, {key}"
            changes.plot(percent, means[key], style, color=colour, marker=marker, label=label)
        shared.plot(percent, means["overlap"], color=colour, marker=marker)
    ratios = np.sort(told["ratio"].unique().astype(float))
    chance = 100 * ratios / (2 - ratios)
    shared.plot(100 * ratios, chance, ":", color="0.5", label="by chance")
    changes.set_title("change of J")
    shared.set_title("choice in common with other seeds'")
    _label(changes, told["ratio"], "% of J")
    _label(shared, told["ratio"], "%")
    shared.set_ylim(-3, 103)
    for panel in (changes, shared):
        panel.legend(fontsize=6, frameon=False)


def _label(panel: Axes, ratios: pd.Series[float], quantity: str) -> None:
    panel.set_xscale("log")
    panel.set_xticks(sorted(100 * ratios.unique()))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.tick_params(axis="x", labelrotation=45)
    panel.set(xlabel="zeroed weights, %", ylabel=quantity)


def _cell(mean: Interval) -> str:
    return f"{mean.value:.1f} [{mean.low:.1f}, {mean.high:.1f}]"
