"""Trials of estimators as a table, a picture, and the ratios at equal quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from omegaconf import DictConfig

from cad.models.base import resolve_device
from evaluation.files import write_atomically
from experiments.benchmarks.measuring import write_benchmark
from experiments.figures.style import BLACK, BLUE, GREEN, ORANGE, SKY, new_canvas, save
from experiments.rendering import DASH, show_table

NAME = "estimators"
QUALITIES = {"rank_correlation": "rank correlation", "mask_overlap": "mask overlap"}
STYLES = ((ORANGE, "o"), (BLACK, "D"), (SKY, "^"), (BLUE, "s"), (GREEN, "v"), ("#CC79A7", "P"))
PANEL = (4.4, 3.8)  # inches
EFFECTS = {"target": "class", "others": "others"}  # scope: what the table calls it


@dataclass(frozen=True)
class Row:
    """A trial: what it cost, and its agreement with each reference by name."""

    estimator: str
    samples: int
    round: int
    seconds: float
    cached: bool  # the seconds are those of an earlier run
    tflop: float
    memory_mb: float
    rank_correlation: dict[str, float]
    mask_overlap: dict[str, float]


def write_quality(config: DictConfig, rows: Sequence[Row], rate: float) -> None:
    """estimators.md, .json and .png in the output folder, and who is as good for less beside it.

    rate: FLOP/s of the machine's matrix products. The tables are shown, too.
    """
    references, baseline = list(config.references), str(config.baseline)
    frame = pd.json_normalize([asdict(row) for row in rows])
    summary = summarise(frame)
    caption = (
        f"Attribution of {_what(config)}: medians of time and means of quality over "
        f"{config.rounds} rounds, {int(frame['cached'].sum())} of {len(frame)} times from an "
        f"earlier run; the machine multiplies matrices at {rate / 1e9:.0f} GFLOP/s"
    )
    _write(config, NAME, caption, as_table(summary, references, rate, baseline), frame)
    equal = at_equal_quality(summary, references, baseline)
    caption = f"The cheapest that is at least as good, of {_what(config)}"
    _write(config, f"{NAME}_equal_quality", caption, equal, equal)
    picture = save(draw(summary, references[0]))["png"]
    write_atomically(Path(config.output) / f"{NAME}.png", picture)


def write_effects(config: DictConfig, effects: pd.DataFrame) -> None:
    """estimators_effects.md and .json."""
    caption = (
        f"Accuracy after edits made from such scores, of {_what(config)}, %: mean, least and most "
        f"of {config.effects.rounds} rounds ({' '.join(config.effects.overrides)})"
    )
    _write(config, f"{NAME}_effects", caption, effects_table(effects), effects)


def _what(config: DictConfig) -> str:
    return f"{config.concept.name} in model={config.model.name}, {config.component} weights"


def _write(
    config: DictConfig, name: str, caption: str, table: pd.DataFrame, records: pd.DataFrame
) -> None:
    show_table(table, caption)
    rows = [{str(k): v for k, v in row.items()} for row in records.to_dict("records")]
    write_benchmark(Path(config.output), name, caption, rows, resolve_device(config.device), table)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each estimator and number of samples, in the order of the trials."""
    qualities = [column for column in frame if str(column).startswith(tuple(QUALITIES))]
    grouped = frame.groupby(["estimator", "samples"], sort=False)
    found = grouped[["seconds", "tflop", "memory_mb"]].median()
    found = found.join(grouped[qualities].mean())
    spread = grouped[qualities].std().add_suffix(".std")
    return found.join(spread).reset_index()


def as_table(
    summary: pd.DataFrame, references: Sequence[str], rate: float, baseline: str
) -> pd.DataFrame:
    """The summary in words; time is also given relative to one sample of the baseline."""
    one = _only(summary, baseline, 1)["seconds"]
    return pd.DataFrame(
        {
            "estimator": row["estimator"],
            "samples": row["samples"],
            "seconds": f"{row['seconds']:.1f}",
            "faster": f"{one / row['seconds']:.1f}",
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


def at_equal_quality(
    summary: pd.DataFrame, references: Sequence[str], baseline: str
) -> pd.DataFrame:
    """For each number of the baseline's samples, the cheapest of the others that is as good."""
    rows = []
    others = summary[summary["estimator"] != baseline].sort_values("seconds")
    for reference in references:
        for quality, words in QUALITIES.items():
            column = f"{quality}.{reference}"
            for _, row in summary[summary["estimator"] == baseline].iterrows():
                as_good = others[others[column] >= row[column]].head(1)
                found = {"cheapest": DASH, "its quality": DASH, "times faster": DASH}
                for _, best in as_good.iterrows():
                    found = {
                        "cheapest": f"{best['estimator']}, {best['samples']}",
                        "its quality": f"{best[column]:.3f}",
                        "times faster": f"{row['seconds'] / best['seconds']:.1f}",
                    }
                told = f"{baseline}, {row['samples']}"
                rows.append(
                    {"as good as": told, "by": words, "with": reference}
                    | {"quality": f"{row[column]:.3f}"}
                    | found
                )
    return pd.DataFrame(rows)


def effects_table(effects: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on the class and on the others after the edit, a row per estimator and samples."""
    after = effects[(effects["state"] == "after") & (effects["metric"] == "accuracy")]
    rows = []
    for (estimator, samples), group in after.groupby(["estimator", "samples"], sort=False):
        row: dict[str, Any] = {"estimator": estimator, "samples": samples}
        for scope, words in EFFECTS.items():
            values = group[group["scope"] == scope]["value"]
            row[words] = f"{values.mean():.1f}"
            row[f"{words}, least to most"] = f"{values.min():.1f} to {values.max():.1f}"
        rows.append(row)
    before = effects[(effects["state"] == "before") & (effects["metric"] == "accuracy")]
    unedited: dict[str, Any] = {"estimator": "no edit", "samples": DASH}
    for scope, words in EFFECTS.items():
        unedited[words] = f"{before[before['scope'] == scope]['value'].mean():.1f}"
        unedited[f"{words}, least to most"] = ""
    return pd.DataFrame([unedited, *rows])


def draw(summary: pd.DataFrame, reference: str) -> Canvas:
    """Quality against wall time, a panel for each measure of quality, a line per estimator."""
    canvas = new_canvas(PANEL[0] * len(QUALITIES), PANEL[1])
    panels = canvas.subplots(1, len(QUALITIES), squeeze=False)[0]
    for panel, (quality, words) in zip(panels, QUALITIES.items(), strict=True):
        _draw(panel, summary, f"{quality}.{reference}")
        panel.set(xlabel="wall time, s", ylabel=f"{words} with many samples ({reference})")
    panels[0].legend(fontsize="small")
    return canvas


def _draw(panel: Axes, summary: pd.DataFrame, column: str) -> None:
    estimators: Mapping[str, pd.DataFrame] = {
        str(name): group for name, group in summary.groupby("estimator", sort=False)
    }
    for (colour, marker), (name, group) in zip(STYLES, estimators.items(), strict=False):
        panel.errorbar(
            group["seconds"],
            group[column],
            yerr=group[f"{column}.std"].fillna(0.0),
            color=colour,
            marker=marker,
            capsize=2,
            label=name.replace("_", " "),
        )
        for _, row in group.iterrows():
            panel.annotate(
                str(row["samples"]),
                (row["seconds"], row[column]),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize="x-small",
                color=colour,
            )
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")


def _only(summary: pd.DataFrame, estimator: str, samples: int) -> pd.Series[Any]:
    found = summary[(summary["estimator"] == estimator) & (summary["samples"] == samples)]
    return found.iloc[0]
