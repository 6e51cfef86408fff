"""Measured estimators as tables and a picture: quality against time, and time at equal quality."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes

from experiments.run.curves import BLACK, BLUE, GREEN, ORANGE, SKY, new_canvas, save
from experiments.run.rendering import DASH

QUALITIES = {"rank_correlation": "rank correlation", "mask_overlap": "mask overlap"}
STYLES = ((ORANGE, "o"), (BLACK, "D"), (SKY, "^"), (BLUE, "s"), (GREEN, "v"))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each estimator and number of samples: median costs, mean qualities, their spread.

    `rows` has one row per trial, and a column `<quality>.<reference>` for each pair of these.
    """
    qualities = [column for column in rows if str(column).startswith(tuple(QUALITIES))]
    grouped = rows.groupby(["estimator", "samples"], sort=False)
    costs = grouped[["seconds", "tflop", "memory_mb"]].median()
    spread = grouped[qualities].std().add_suffix(".std")
    return costs.join(grouped[qualities].mean()).join(spread).reset_index()


def cost_table(
    summary: pd.DataFrame, references: Sequence[str], rate: float, baseline: str
) -> pd.DataFrame:
    """The summary in words; "faster" is relative to one sample of the baseline.

    rate: FLOP/s of the machine's matrix products.
    """
    first = (summary["estimator"] == baseline) & (summary["samples"] == 1)
    (slowest,) = summary[first]["seconds"]
    return pd.DataFrame(
        {
            "estimator": row["estimator"],
            "samples": row["samples"],
            "seconds": f"{row['seconds']:.1f}",
            "faster": f"{slowest / row['seconds']:.1f}",
            "TFLOP": f"{row['tflop']:.2f}",
            "of the matrix rate, %": f"{100e12 * row['tflop'] / row['seconds'] / rate:.0f}",
            "memory, MB": f"{row['memory_mb']:.0f}",
        }
        | {
            f"{words}, {reference}": f"{row[f'{quality}.{reference}']:.3f}"
            for quality, words in QUALITIES.items()
            for reference in references
        }
        for _, row in summary.iterrows()
    )


def equal_quality_table(
    summary: pd.DataFrame, references: Sequence[str], baseline: str
) -> pd.DataFrame:
    """For each number of the baseline's samples, the fastest of the others that is as good."""
    is_baseline = summary["estimator"] == baseline
    others = summary[~is_baseline].sort_values("seconds")
    return pd.DataFrame(
        {
            "as good as": f"{baseline}, {row['samples']}",
            "by": words,
            "with": reference,
            **_cheapest(row, others, f"{quality}.{reference}"),
        }
        for reference in references
        for quality, words in QUALITIES.items()
        for _, row in summary[is_baseline].iterrows()
    )


def _cheapest(row: pd.Series, others: pd.DataFrame, column: str) -> dict[str, str]:
    """Cells that compare `row` with the first of `others` whose `column` is not worse."""
    as_good = others[others[column] >= row[column]]
    cells = {"quality": f"{row[column]:.3f}", "cheapest": DASH, "its quality": DASH}
    if as_good.empty:
        return cells | {"times faster": DASH}
    best = as_good.iloc[0]
    return cells | {
        "cheapest": f"{best['estimator']}, {best['samples']}",
        "its quality": f"{best[column]:.3f}",
        "times faster": f"{row['seconds'] / best['seconds']:.1f}",
    }


def draw(summary: pd.DataFrame, reference: str) -> bytes:
    """PNG of quality against wall time: one panel per quality, one line per estimator."""
    canvas = new_canvas(8.8, 3.8)
    panels = canvas.subplots(1, len(QUALITIES))
    for panel, (quality, words) in zip(panels, QUALITIES.items(), strict=True):
        _draw_panel(panel, summary, f"{quality}.{reference}")
        panel.set(xlabel="wall time, s", ylabel=f"{words} with many samples ({reference})")
    panels[0].legend(fontsize="small")
    return save(canvas)["png"]


def _draw_panel(panel: Axes, summary: pd.DataFrame, column: str) -> None:
    groups = summary.groupby("estimator", sort=False)
    for (colour, marker), (name, group) in zip(cycle(STYLES), groups, strict=False):
        panel.errorbar(
            group["seconds"],
            group[column],
            yerr=group[f"{column}.std"].fillna(0.0),
            color=colour,
            marker=marker,
            capsize=2,
            label=str(name).replace("_", " "),
        )
        for samples, x, y in group[["samples", "seconds", column]].itertuples(index=False):
            panel.annotate(str(samples), (x, y), fontsize="x-small", color=colour)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
