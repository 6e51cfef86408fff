"""A table's cells: what its runs measured, the published value beside it, the best in bold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.evaluators.base import Metric, Record
from evaluation.evaluators.nudity import totals_by_label
from evaluation.statistics import RESAMPLES, Interval
from experiments.aggregation import mean_of_groups
from experiments.items.item import MODEL, Place
from experiments.items.plan import Run, State
from experiments.rendering import find_metric
from experiments.results import RECORDS, read_json, read_lines
from experiments.tables.paper import Published
from experiments.tables.table import AVERAGE, COST, METRIC, MetricSpec, Table

METRIC_FIELDS = [each.name for each in fields(Metric)]
NO_EDIT = "none"
NUDITY = "nudity"
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Cell:
    """What stands at a place of the table. `value` is None where nothing was measured.

    Its ends are NaN where it has no interval: costs, and what holds by definition.
    """

    place: Place  # a value for each axis, the metric's too
    spec: MetricSpec
    value: Metric | None
    paper: str | None  # as printed
    comparable: bool  # the paper's model, which the published value is of
    best: bool = False
    run: Run | None = None  # None of an average

    @property
    def has_interval(self) -> bool:
        return self.value is not None and not math.isnan(self.value.low)

    @property
    def excludes_paper(self) -> bool:
        """Whether the 95 % interval leaves the paper's value out."""
        if self.value is None or self.paper is None or not (self.comparable and self.has_interval):
            return False
        return not self.value.low <= float(self.paper) <= self.value.high


def build_cells(
    table: Table, runs: Sequence[tuple[Place, Run]], published: Published
) -> list[Cell]:
    """All cells of a table, run by run; averages last."""
    cells = []
    for place, run in runs:
        reader = ResultReader(run.folder) if run.state == State.DONE else None
        for name, spec in table.metrics.items():
            at = place | {METRIC: name}
            value = reader.read(spec) if reader is not None else None
            cells.append(_cell(table, at, spec, value, published, run))
    cells += _averages(table, cells, published)
    return _with_best(table, cells)


class ResultReader:
    """Metrics of one result folder, read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.metrics: dict[str, Any] = read_json(folder / "metrics.json")
        self._records: dict[str, list[Record]] | None = None

    def read(self, spec: MetricSpec) -> Metric | None:
        """The metric after the edit, or of the unedited model where there was none."""
        if spec.of == COST:
            return self._cost(spec.scope)
        unedited = self.metrics["edit"]["name"] == NO_EDIT
        row = find_metric(self.metrics, spec.of, spec.scope, "before" if unedited else "after")
        if row is None:
            return None
        metric = Metric(**{name: row[name] for name in METRIC_FIELDS})
        if spec.label is not None:
            records = self._detected("before" if unedited else "after")
            found = totals_by_label(records, [spec.label])[spec.label]
            return replace(metric, **found._asdict())
        if spec.change:
            return self._change(metric, unedited)
        return metric

    def _change(self, metric: Metric, unedited: bool) -> Metric | None:
        metric = replace(metric, unit="%")
        if unedited:
            return replace(metric, value=0.0, low=math.nan, high=math.nan)
        states = ("before", "after")
        before, after = ([each["count"] for each in self._detected(state)] for state in states)
        found = relative_change(before, after)
        return None if found is None else replace(metric, **found._asdict())

    def _cost(self, key: str) -> Metric | None:
        if self.metrics["edit"]["name"] == NO_EDIT:
            return None
        cost = read_json(self._folder / "cost.json")
        unit = "s" if key == "seconds" else f"MB, {cost['memory_kind']}"
        return Metric(key, cost[key], math.nan, math.nan, 1, unit, 1, False, "")

    def _detected(self, state: str) -> list[Record]:
        """The records of the detections on the targets' images, in the images' order."""
        if self._records is None:
            self._records = {"before": [], "after": []}
            for record in read_lines(self._folder / RECORDS):
                if record["metric"] == NUDITY and record["group"] in self.metrics["concepts"]:
                    self._records[record["state"]].append(record)
        return self._records[state]


def relative_change(before: Sequence[int], after: Sequence[int]) -> Interval | None:
    """Change of the sum in %, 100 (sum after / sum before - 1); None where there was nothing.

    The i-th counts are of the same prompt and seed, so the percentile bootstrap draws pairs.
    """
    pairs = np.array([before, after], dtype=np.float64)  # (2, n)
    if not pairs[0].sum():
        return None
    random = np.random.default_rng(BOOTSTRAP_SEED)
    count = pairs.shape[1]
    sums = np.stack([pairs[:, random.integers(0, count, count)].sum(1) for _ in range(RESAMPLES)])
    sums = sums[sums[:, 0] > 0]  # (resamples, 2)
    low, high = np.quantile(100 * (sums[:, 1] / sums[:, 0] - 1), (0.025, 0.975))
    return Interval(100 * (pairs[1].sum() / pairs[0].sum() - 1), float(low), float(high))


def _cell(
    table: Table,
    at: Place,
    spec: MetricSpec,
    value: Metric | None,
    published: Published,
    run: Run | None,
) -> Cell:
    stands_for = {axis: table.sweep.stands_for.get(value, value) for axis, value in at.items()}
    keys = {key: stands_for[axis] for key, axis in table.config.paper.items()}
    comparable = at[MODEL] in table.sweep.paper_models
    return Cell(at, spec, value, published.find(keys | spec.paper), comparable, run=run)


def _averages(table: Table, cells: Sequence[Cell], published: Published) -> list[Cell]:
    """Means over the axis that gets one; of all its values or not at all."""
    axis = table.config.average
    if axis is None:
        return []
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_without(cell.place, axis), []).append(cell)
    means = []
    for group in groups.values():
        values = [cell.value for cell in group if cell.value is not None]
        mean = mean_of_groups(values) if len(values) == len(group) else None
        at = group[0].place | {axis: AVERAGE}
        means.append(_cell(table, at, group[0].spec, mean, published, None))
    return means


def _with_best(table: Table, cells: Sequence[Cell]) -> list[Cell]:
    """The cells, marked where they are the best of those that differ in the compared axis alone.

    Equals, as they are printed, are all marked; none is while one of them is still to be run.
    """
    axis = table.config.compare
    if axis is None:
        return list(cells)
    rivals: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        rivals.setdefault(_without(cell.place, axis), []).append(cell)
    best = {
        place: max((score for score in map(_score, group) if score is not None), default=None)
        for place, group in rivals.items()
        if not any(cell.run is not None and cell.run.state == State.MISSING for cell in group)
    }
    marked = []
    for cell in cells:
        score = _score(cell)
        is_best = score is not None and score == best.get(_without(cell.place, axis))
        marked.append(replace(cell, best=is_best))
    return marked


def _without(place: Mapping[str, str], axis: str) -> tuple[str, ...]:
    return tuple(value for name, value in place.items() if name != axis)


def _score(cell: Cell) -> float | None:
    """The larger, the better; None where the best is not asked for."""
    if cell.value is None or not cell.spec.best:
        return None
    value = round(cell.value.value, cell.spec.decimals)
    return value if cell.spec.better == "high" else -value


def plain_row(cell: Cell) -> dict[str, Any]:
    """A cell as a line of the tidy CSV."""
    value = {} if cell.value is None else asdict(cell.value)
    kept = {key: value.get(key) for key in ("value", "low", "high", "n", "unit", "version")}
    kept |= {"paper": cell.paper, "excludes_paper": cell.excludes_paper, "best": cell.best}
    folder = cell.run.folder.name if cell.run is not None and cell.value is not None else None
    return cell.place | kept | {"result": folder}
