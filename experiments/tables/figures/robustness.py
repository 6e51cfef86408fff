"""Robustness: erasing, keeping, and what brings a concept back, of every method beside the others.

All is in percent, the more the better: of what is to stay, what stayed; of the concept, what is
gone. Methods are ranked by the harmonic mean of some of these. A quantity none of whose runs is
finished has no column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure as Canvas

from evaluation.evaluators.base import Interval, Metric
from experiments.run.curves import new_canvas
from experiments.run.groups import mean_of_groups
from experiments.run.rendering import DASH, display, find_metric
from experiments.run.results import read_json
from experiments.tables.exhibit import EDIT, ListedRun
from experiments.tables.figures.drawing import Drawing

STATE, CONCEPT = "state", "concept"  # axes: what is done to the edited model, what was erased
MARKERS = "os^vD<>px*+"


@dataclass(frozen=True)
class Quantity:
    """A column: a metric of the runs of a state, and whether less of it is better."""

    state: str
    metric: str
    scope: str = "target"
    groups: Mapping[str, Sequence[str | None]] = field(default_factory=dict)  # by concept: these
    when: str = "after"  # the edit, or "before" it
    gone: bool = True  # 100 % less the metric
    ranks: bool = True  # a part of the harmonic mean
    control: bool = False  # no part of the mean, nor of the picture


def draw_robustness(
    runs: Sequence[ListedRun], quantities: Mapping[str, Mapping[str, Any]]
) -> Drawing:
    """Parallel coordinates of means over concepts, a line for each method; all as a table.

    quantities: headings with the fields of `Quantity`; time is of the runs of the first one's
    state. The axes are "edit", "concept" and "state".
    """
    found_states = {run.place[STATE] for run in runs}
    columns = {name: Quantity(**given) for name, given in quantities.items()}
    columns = {name: each for name, each in columns.items() if each.state in found_states}
    ranking = [name for name, each in columns.items() if each.ranks and not each.control]
    measured, rows, data = {}, [], []
    for edit in dict.fromkeys(run.place[EDIT] for run in runs):
        own = [run for run in runs if run.place[EDIT] == edit]
        found = {name: mean(own, column) for name, column in columns.items()}
        measured[edit] = {name: each for name, each in found.items() if each is not None}
        overall = harmonic([found[name] for name in ranking])
        time = seconds(own, next(iter(quantities.values()))["state"])
        cells = [*(_cell(each) for each in found.values()), time, _cell(overall)]
        rows.append((overall.value if overall else -1.0, [display(edit), *cells]))
        data += [{"edit": edit, "quantity": k, **asdict(m)} for k, m in measured[edit].items()]
    rows.sort(key=lambda row: -row[0])
    heads = ["method", *(f"{name}, %" for name in columns), "time, s", "harmonic mean, %"]
    says = [
        "Means over concepts, with 95 % intervals, of time with the least and the most; harmonic "
        f"mean: of {', '.join(ranking)}, its interval by the method of Zou and others, with the "
        "mean's derivatives."
    ]
    near = {k: v for each in columns.values() for k, v in each.groups.items()}
    says += [f"Neighbours: {_listed(near)}."] if near else []
    table = pd.DataFrame([cells for _, cells in rows], columns=heads)
    shown = [name for name, each in columns.items() if not each.control]
    return Drawing(_parallel(measured, shown), pd.DataFrame(data), says, table)


def seconds(runs: Sequence[ListedRun], state: str) -> str:
    """The mean time of making the edits of a state, the least and the most, as a cell."""
    own = [run for run in runs if run.place[STATE] == state]
    times = [read_json(run.folder / "cost.json")["seconds"] for run in own]
    return _cell(Interval(sum(times) / len(times), min(times), max(times)) if times else None)


def mean(runs: Sequence[ListedRun], column: Quantity) -> Metric | None:
    """A quantity's mean over the runs of its state, in percent; None where one has it not."""
    found = []
    for run in runs:
        if run.place[STATE] == column.state:
            metrics = read_json(run.folder / "metrics.json")
            for group in column.groups.get(run.place[CONCEPT], [None]):
                row = find_metric(metrics, column.metric, column.scope, column.when, group)
                if row is None:
                    return None
                known = {key: row[key] for key in Metric.__dataclass_fields__}
                found.append(percent(Metric(**known), column.gone))
    return mean_of_groups(found) if found else None


def percent(metric: Metric, gone: bool) -> Metric:
    """A share, or a percentage, in percent; 100 less it if that is what is `gone`."""
    scale = 100.0 if metric.unit == "share" else 1.0
    value, low, high = (scale * each for each in (metric.value, metric.low, metric.high))
    if gone:
        value, low, high = 100 - value, 100 - high, 100 - low
    return replace(metric, value=value, low=low, high=high, unit="%", decimals=1)


def harmonic(found: Sequence[Metric | None]) -> Interval | None:
    """The harmonic mean H; 0 where one is, None where one was not measured.

    Ends: the parts' distances, times dH/dx = H^2 / n x^2, put together as by `mean_of_groups`.
    """
    metrics = [each for each in found if each is not None]
    if len(metrics) < len(found):
        return None
    values = [metric.value for metric in metrics]
    if min(values) <= 0:
        return Interval(0.0, 0.0, math.nan)
    h = len(values) / sum(1 / value for value in values)
    slopes = [h**2 / len(values) / value**2 for value in values]
    pairs = list(zip(slopes, metrics, strict=True))
    below = math.hypot(*(slope * (metric.value - metric.low) for slope, metric in pairs))
    above = math.hypot(*(slope * (metric.high - metric.value) for slope, metric in pairs))
    return Interval(h, max(0.0, h - below), min(100.0, h + above))


def _parallel(measured: Mapping[str, Mapping[str, Metric]], names: Sequence[str]) -> Canvas:
    canvas = new_canvas(1.5 * len(names) + 3, 4.2)
    panel, colours = canvas.subplots(), colormaps["tab10"]
    for i, (edit, every) in enumerate(measured.items()):
        found = {name: every[name] for name in names if name in every}
        at = [names.index(name) + 0.03 * (i - len(measured) / 2) for name in found]
        ends = [(m.value - m.low, m.high - m.value) for m in found.values()]
        panel.errorbar(
            at,
            [metric.value for metric in found.values()],
            yerr=[[max(0.0, end[side]) for end in ends] for side in (0, 1)],
            color=colours(i % 10),
            marker=MARKERS[i % len(MARKERS)],
            elinewidth=0.6,
            label=display(edit),
        )
    panel.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    panel.set(ylabel="%, the more the better", ylim=(-3, 103))
    canvas.legend(loc="outside right upper", fontsize="small")
    return canvas


def _listed(groups: Mapping[str, Sequence[str | None]]) -> str:
    """ "of church French horn and tench; of ..."."""
    words = {k: " and ".join(display(each) for each in v if each) for k, v in groups.items()}
    return "; ".join(f"of {display(concept)} {names}" for concept, names in words.items())


def _cell(found: Metric | Interval | None) -> str:
    if found is None:
        return DASH
    ends = "" if math.isnan(found.high) else f" [{found.low:.1f}, {found.high:.1f}]"
    return f"{found.value:.1f}{ends}"
