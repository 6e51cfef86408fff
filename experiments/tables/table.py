"""What a table is: the schema of conf/table/*.yaml, and a table for one model at one scale."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from cad.errors import UserError
from experiments.tables.plan import Overrides, last_of_each_key

MINIATURE = "mini"
MODEL = "model"  # the axis that every table has
METRIC = "metric"  # the other one: what a cell shows of its run
COST = "cost"  # of a metric: what making the edit took
SCOPES = ("target", "others", "general")
BETTER = (None, "low", "high")
AVERAGE = "average"

Place = dict[str, str]
"""A value for each axis."""


@dataclass
class MetricSpec:
    """What a cell shows of its run; the keys of conf/table's `metrics`."""

    heading: str = MISSING  # with the unit
    of: str = MISSING  # evaluator's name, or cost
    scope: str = "target"  # target | others | general; of cost: seconds | peak_memory_mb
    label: str | None = None  # of nudity: the detections of this NudeNet label alone
    change: bool = False  # of nudity: against the unedited model, %
    decimals: int = 1
    better: str | None = None  # low | high: the arrow beside the heading
    best: bool = False  # print the best in bold
    paper: dict[str, str] = field(default_factory=dict)  # columns of the published file: values


@dataclass
class Skip:
    """Runs that are not attempted."""

    when: dict[str, str] = field(default_factory=dict)  # axis: value; all of them; {}: every run
    reason: str = MISSING


@dataclass
class Part:
    """What a version of a table has of its own."""

    runs: list[str] = field(default_factory=list)  # more overrides
    axes: dict[str, Any] = field(default_factory=dict)  # each replaces the axis of its name
    metrics: dict[str, MetricSpec] = field(default_factory=dict)  # if any, they replace all
    skip: list[Skip] = field(default_factory=list)  # more of them
    stands_for: dict[str, str] = field(default_factory=dict)  # value: the paper's in its place
    note: str = ""  # a sentence for the caption


@dataclass
class TableConfig:
    """conf/table/*.yaml."""

    number: int = MISSING
    title: str = MISSING
    models: list[str] = MISSING  # the paper's
    runs: list[str] = field(default_factory=list)  # overrides of every run
    axes: dict[str, Any] = field(default_factory=dict)  # [value, ...] or {value: [override, ...]}
    metrics: dict[str, MetricSpec] = field(default_factory=dict)
    skip: list[Skip] = field(default_factory=list)
    rows: list[str] = MISSING  # axes, "metric" among them
    columns: list[str] = MISSING
    compare: str | None = None  # the axis over which the best is found
    average: str | None = None  # the axis that gets a mean
    paper: dict[str, str] = field(default_factory=dict)  # column of the published file: axis
    note: str = ""
    mini: Part = field(default_factory=Part)
    fast: Part = field(default_factory=Part)  # of the miniature's


@dataclass(frozen=True)
class Table:
    """A table for its models: the paper's, or the miniature, perhaps the fast one."""

    config: TableConfig
    paper_models: tuple[str, ...]
    models: tuple[str, ...]
    runs: Overrides
    axes: Mapping[str, Mapping[str, Overrides]]  # axis: value: overrides; without metrics
    metrics: Mapping[str, MetricSpec]
    skip: tuple[Skip, ...]
    stands_for: Mapping[str, str]
    notes: tuple[str, ...]
    fast: bool

    @property
    def name(self) -> str:
        """Of its files: "table01-mini-fast"."""
        words = [f"table{self.config.number:02d}", *self.models, *(["fast"] if self.fast else [])]
        return "-".join(words)

    @property
    def is_miniature(self) -> bool:
        return self.models == (MINIATURE,)

    def places(self) -> Iterator[Place]:
        """Every combination of the axes' values: one for each run."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def overrides(self, place: Place, more: Sequence[str] = ()) -> Overrides:
        """Of the run at a place; what comes `more` is last."""
        chosen = [each for axis, value in place.items() for each in self.axes[axis][value]]
        return last_of_each_key([*self.runs, *chosen, *more])

    def skipped(self, place: Place) -> str | None:
        """Why the run at a place is not attempted, if it is not."""
        for skip in self.skip:
            if all(place[axis] == value for axis, value in skip.when.items()):
                return skip.reason
        return None

    def values(self, axis: str) -> list[str]:
        """An axis's values in order, the average's row last."""
        if axis == METRIC:
            return list(self.metrics)
        average = [AVERAGE] if axis == self.config.average else []
        return [*self.axes[axis], *average]


def read_table(node: DictConfig, model: str | None, fast: bool) -> Table:
    """The table that a configuration describes, for its own models or the one that is named.

    Raises UserError for a model that the table does not have, and OmegaConf's error for a key that
    no table has.
    """
    merged = OmegaConf.merge(OmegaConf.structured(TableConfig), node)
    config = OmegaConf.to_object(merged)
    if not isinstance(config, TableConfig):
        raise TypeError(f"a table is a mapping, not {type(config).__name__}")
    models = _models(config, model)
    parts = [config.mini] if models == (MINIATURE,) else []
    if fast:
        if not parts:
            raise UserError(
                f"fast=true is the miniature's: Table {config.number} of {', '.join(models)} has "
                "one size. Make it smaller with filter=..., or take model=mini"
            )
        parts.append(config.fast)
    axes: dict[str, dict[str, Overrides]] = {MODEL: {name: (f"{MODEL}={name}",) for name in models}}
    for given in (config.axes, *(part.axes for part in parts)):
        axes |= {str(axis): _axis(str(axis), values) for axis, values in given.items()}
    metrics = config.metrics
    for part in parts:
        metrics = part.metrics or metrics
    table = Table(
        config=config,
        paper_models=tuple(config.models),
        models=models,
        runs=(*config.runs, *(each for part in parts for each in part.runs)),
        axes=axes,
        metrics=metrics,
        skip=(*config.skip, *(each for part in parts for each in part.skip)),
        stands_for={k: v for part in parts for k, v in part.stands_for.items()},
        notes=tuple(note for note in (config.note, *(part.note for part in parts)) if note),
        fast=fast,
    )
    _check(table)
    return table


def parse_filter(text: str, axes: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """ "concept=church edit=uce,rece" as {axis: values}. UserError for what the table has not."""
    chosen: dict[str, set[str]] = {}
    for word in text.split():
        axis, _, values = word.partition("=")
        if axis not in axes:
            raise UserError(f"filter={text!r}: no axis {axis!r}; choose from {', '.join(axes)}")
        for value in values.split(","):
            if value not in axes[axis]:
                allowed = ", ".join(axes[axis])
                raise UserError(f"filter={text!r}: {axis} has no {value!r}, but {allowed}")
            chosen.setdefault(axis, set()).add(value)
    return chosen


def _models(config: TableConfig, model: str | None) -> tuple[str, ...]:
    if model is None:
        return tuple(config.models)
    if model not in (*config.models, MINIATURE):
        raise UserError(
            f"model={model}: Table {config.number} is of {' and '.join(config.models)}; its "
            f"miniature is model={MINIATURE}"
        )
    return (model,)


def _axis(axis: str, values: Any) -> dict[str, Overrides]:
    if isinstance(values, Mapping):
        return {str(name): tuple(overrides) for name, overrides in values.items()}
    return {str(value): (f"{axis}={value}",) for value in values}


def _check(table: Table) -> None:
    config, number = table.config, table.config.number
    laid_out = [*config.rows, *config.columns]
    several = [axis for axis in (*table.axes, METRIC) if len(table.values(axis)) > 1]
    lost = [axis for axis in several if axis not in laid_out]
    named = [*laid_out, *config.paper.values()]
    named += [axis for axis in (config.compare, config.average) if axis is not None]
    named += [axis for skip in table.skip for axis in skip.when]
    unknown = [axis for axis in named if axis not in (*table.axes, METRIC)]
    if lost or unknown:
        raise UserError(
            f"conf/table of Table {number}: {', '.join(lost or unknown)} is "
            f"{'in neither rows nor columns' if lost else 'no axis'}; the axes are "
            f"{', '.join((*table.axes, METRIC))}"
        )
    for name, spec in table.metrics.items():
        scopes = ("seconds", "peak_memory_mb") if spec.of == COST else SCOPES
        for key, value, allowed in (
            ("scope", spec.scope, scopes),
            ("better", spec.better, BETTER),
        ):
            if value not in allowed:
                words = ", ".join(str(each or "null") for each in allowed)
                raise UserError(
                    f"conf/table of Table {number}: metrics.{name}.{key}={value} is not allowed; "
                    f"choose one of {words}"
                )
