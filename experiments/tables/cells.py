"""A table's cells: what its runs measured, the published value beside it, the best in bold.

Bold is what is significantly better than each other edit, of a single one than the unedited model
(p < 0.05, not corrected for their number). Where images are judged one by one that is McNemar's
exact test, since all edits share prompts and seeds; elsewhere the 95 % intervals must be disjoint,
which is stricter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from evaluation.evaluators.base import Interval, Metric, Record
from evaluation.evaluators.nudity import relative_change, totals_by_label
from experiments.run.groups import mean_of_groups
from experiments.run.rendering import find_metric
from experiments.run.results import RECORDS, read_json, read_lines
from experiments.tables.exhibit import (
    AVERAGE,
    COST,
    EDIT,
    METRIC,
    MODEL,
    SEED,
    Better,
    ListedRun,
    Place,
    Scope,
    ShownMetric,
    Table,
)

METRIC_FIELDS = [each.name for each in fields(Metric)]
IN_CSV = ("value", "low", "high", "n", "unit", "version")  # of a metric
PUBLISHED_KEYS = ("model", "prompts", "attack", "row", "column", "metric")
NO_EDIT = "none"
NUDITY = "nudity"
SIGNIFICANT = 0.05

Judged = Mapping[tuple[Any, ...], bool]
"""Whether an image shows its subject, by what tells the image from others of the run."""

Published = Mapping[frozenset[tuple[str, str]], str]
"""A table's printed values, as text with the printed digits, by {(column of the file, value)}."""


@dataclass
class Cell:
    """A cell of the table. `value` is None where nothing was measured.

    Its ends are NaN where it has no interval: costs, and what holds by definition.
    """

    place: Place  # a value for each axis, the metric's too
    shown: ShownMetric
    value: Metric | None
    paper: str | None  # as printed
    comparable: bool  # the paper's model, which the published value is of
    run: ListedRun | None  # None of an average; of several seeds one that is missing, if any is
    judged: Judged = field(default_factory=dict)  # what the value is the share of, if it is one
    best: bool = False
    deviation: float | None = None  # the standard deviation over seeds

    @property
    def has_interval(self) -> bool:
        return self.value is not None and not math.isnan(self.value.low)

    @property
    def excludes_paper(self) -> bool:
        """Whether the 95 % interval leaves the paper's value out."""
        if self.value is None or self.paper is None or not (self.comparable and self.has_interval):
            return False
        return not self.value.low <= float(self.paper) <= self.value.high

    def row(self) -> dict[str, Any]:
        """The cell as a line of the tidy CSV."""
        value = {} if self.value is None else asdict(self.value)
        result = None if self.run is None or self.value is None else self.run.folder.name
        found = {key: value.get(key) for key in IN_CSV}
        found |= {} if self.deviation is None else {"deviation": self.deviation}
        told = {"paper": self.paper, "excludes_paper": self.excludes_paper, "best": self.best}
        return {**self.place, **found, **told, "result": result}


def read_published(path: Path) -> Published:
    """The values of results/paper/tableNN.csv; none where the paper has no such table."""
    if not path.exists():
        return {}
    return {
        frozenset((key, row[key]) for key in PUBLISHED_KEYS if key in row): row["value"]
        for row in pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    }


def build_cells(table: Table, runs: Sequence[ListedRun], published: Published) -> list[Cell]:
    """All cells of a table, run by run, seeds taken together; averages last."""
    cells = []
    for run in runs:
        reader = None if run.result is None else ResultReader(run.result)
        for name, shown in table.metrics.items():
            value = None if reader is None else reader.read(shown)
            cells.append(_cell(table, {**run.place, METRIC: name}, value, published, run))
            if reader is not None and table.compare is not None and shown.best:
                cells[-1].judged = reader.judged(shown)
    if table.average is not None:
        cells += [
            _mean(table, group, table.average, {table.average: AVERAGE}, published)
            for group in _rivals(cells, table.average)
        ]
    if SEED in table.axes:
        cells = [_over_seeds(table, group, published) for group in _rivals(cells, SEED)]
    if table.compare is not None:
        for group in _rivals(cells, table.compare):
            _mark_best(group)
    return cells


class ResultReader:
    """Metrics of one result folder, read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.metrics: dict[str, Any] = read_json(folder / "metrics.json")

    def read(self, shown: ShownMetric) -> Metric | None:
        """The metric after the edit, or of the unedited model where there was none."""
        unedited = self.metrics["edit"]["name"] == NO_EDIT
        if shown.of == COST:
            return None if unedited else self._cost(shown.scope.name)
        state = "before" if unedited else "after"
        row = find_metric(self.metrics, shown.of, shown.scope.name, state)
        if row is None:
            return None
        metric = Metric(**{name: row[name] for name in METRIC_FIELDS})
        if shown.label is not None:
            total = totals_by_label(self._detections[state], [shown.label])[shown.label]
            return replace(metric, **total._asdict())
        if not shown.change:
            return metric
        before, after = ([each["count"] for each in found] for found in self._detections.values())
        change = Interval(0.0, math.nan, math.nan) if unedited else relative_change(before, after)
        return None if change is None else replace(metric, unit="%", **change._asdict())

    def judged(self, shown: ShownMetric) -> Judged:
        """The images that a share counts; none of another kind of metric."""
        state = "before" if self.metrics["edit"]["name"] == NO_EDIT else "after"
        return {
            (record["group"], record["index"]): record["correct"]
            for record in self._records
            if (record["metric"], record["state"]) == (shown.of, state)
            and (record["group"] in self.metrics["concepts"]) == (shown.scope is Scope.target)
            and "correct" in record
        }

    def _cost(self, key: str) -> Metric:
        cost = read_json(self._folder / "cost.json")
        unit = "s" if key == "seconds" else f"MB, {cost['memory_kind']}"
        return Metric(key, cost[key], math.nan, math.nan, 1, unit, 1, False, "")

    @cached_property
    def _records(self) -> list[Record]:
        return list(read_lines(self._folder / RECORDS))

    @cached_property
    def _detections(self) -> dict[str, list[Record]]:
        """By state, the records of the detections on the targets' images, in their order."""
        found: dict[str, list[Record]] = {"before": [], "after": []}
        for record in self._records:
            if record["metric"] == NUDITY and record["group"] in self.metrics["concepts"]:
                found[record["state"]].append(record)
        return found


def _cell(
    table: Table, place: Place, value: Metric | None, published: Published, run: ListedRun | None
) -> Cell:
    shown = table.metrics[place[METRIC]]
    stands_for = {axis: table.stands_for.get(value, value) for axis, value in place.items()}
    keys = {key: stands_for[axis] for key, axis in table.paper.items()} | shown.paper
    printed = published.get(frozenset(keys.items())) or None
    return Cell(place, shown, value, printed, place[MODEL] in table.paper_models, run)


def _mean(
    table: Table, group: Sequence[Cell], axis: str, there: Place, published: Published
) -> Cell:
    """The mean of cells that differ in this axis alone, of all or none; `there` is its place."""
    values = [cell.value for cell in group if cell.value is not None]
    mean = mean_of_groups(values) if len(values) == len(group) else None
    place = {key: value for key, value in group[0].place.items() if key != axis} | dict(there)
    cell = _cell(table, place, mean, published, None)
    each = ((cell.place[axis], cell.judged) for cell in group)
    cell.judged = {(at, *key): v for at, judged in each for key, v in judged.items()}
    return cell


def _over_seeds(table: Table, group: Sequence[Cell], published: Published) -> Cell:
    """The mean over seeds with its standard deviation, that of a sample."""
    cell = _mean(table, group, SEED, {}, published)
    cell.run = next((each.run for each in group if each.run and each.run.is_missing), None)
    if cell.value is not None:
        cell.deviation = statistics.stdev(each.value.value for each in group if each.value)
    return cell


def _rivals(cells: Sequence[Cell], axis: str) -> list[list[Cell]]:
    """The cells in groups that differ in this axis alone."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        others = tuple(value for name, value in cell.place.items() if name != axis)
        groups.setdefault(others, []).append(cell)
    return list(groups.values())


def _mark_best(rivals: Sequence[Cell]) -> None:
    """Mark the best edit, and its equals as printed; none while one is still to be run.

    The unedited model is no rival but of a single edit.
    """
    if any(cell.run is not None and cell.run.is_missing for cell in rivals):
        return
    scores = {
        place: round(cell.value.value, cell.shown.decimals)
        for place, cell in enumerate(rivals)
        if cell.value is not None and cell.shown.best
    }
    edits = {at: score for at, score in scores.items() if rivals[at].place.get(EDIT) != NO_EDIT}
    scores = scores if len(edits) == 1 else edits
    better = max if rivals[0].shown.better is Better.high else min
    first = [place for place, score in scores.items() if score == better(scores.values())]
    rest = [place for place in scores if place not in first]
    if rest and all(differ(rivals[one], rivals[other]) for one in first for other in rest):
        for place in edits.keys() & first:
            rivals[place].best = True


def differ(one: Cell, other: Cell) -> bool:
    """Whether two cells differ significantly, by the module's tests."""
    shared = one.judged.keys() & other.judged.keys()
    if shared:
        discordant = [key for key in shared if one.judged[key] != other.judged[key]]
        wins = sum(one.judged[key] for key in discordant)
        return bool(discordant) and binomtest(wins, len(discordant)).pvalue < SIGNIFICANT
    if one.value is None or other.value is None or not (one.has_interval and other.has_interval):
        return False
    return one.value.high < other.value.low or other.value.high < one.value.low
