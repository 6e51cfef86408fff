"""Figure 2: does the attribution tell the truth? Predicted against measured changes of J."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import pearsonr

from experiments.run.curves import BLUE, add_legend, new_panels
from experiments.run.rendering import display, join_concepts, title
from experiments.run.results import read_json
from experiments.tables.exhibit import ListedRun
from experiments.tables.figures.drawing import Drawing


def draw_effects(runs: Sequence[ListedRun]) -> Drawing:
    """A panel per run: each of its random ablations as a point, the line of equality, Pearson r."""
    canvas, panels = new_panels(len(runs))
    frames, says = [], []
    for panel, run in zip(panels, runs, strict=True):
        metrics = read_json(run.folder / "metrics.json")
        points = pd.read_csv(run.folder / "effects.csv")
        concept = join_concepts(metrics)
        frames.append(points.assign(concept=concept))
        found = pearsonr(points["predicted"], points["measured"])
        interval = found.confidence_interval(0.95)
        says.append(
            f"{concept}: Pearson r {found.statistic:.3f} [{interval.low:.3f}, {interval.high:.3f}] "
            f"(95 %, by Fisher's z), {len(points)} random ablations of "
            f"{100 * metrics['effect']['share']:g} % of the weights each ({title(metrics)})."
        )
        _scatter(panel, points)
        r = f"r = {found.statistic:.3f}, n = {len(points)}"
        panel.set_title(f"{display(concept)}: {r}")
    add_legend(canvas, panels[0])
    return Drawing(canvas, pd.concat(frames, ignore_index=True), says)


def _scatter(panel: Axes, points: pd.DataFrame) -> None:
    low, high = points.to_numpy().min(), points.to_numpy().max()
    panel.plot([low, high], [low, high], color="0.5", linewidth=1, label="equal")
    panel.scatter(points["predicted"], points["measured"], s=4, color=BLUE, alpha=0.6)
    panel.set(xlabel="predicted change of J", ylabel="measured change of J")
