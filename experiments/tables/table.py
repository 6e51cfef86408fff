"""What a table is: the schema of conf/table/*.yaml, and a table for one model at one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from omegaconf import MISSING, DictConfig

from cad.errors import UserError
from experiments.items.item import (
    MINIATURE,
    Item,
    ItemConfig,
    Part,
    check_axes,
    read_config,
    read_sweep,
    version_parts,
)

METRIC = "metric"  # the axis beside the sweep's: what a cell shows of its run
COST = "cost"  # of a metric: what making the edit took
SCOPES = ("target", "others", "general")
BETTER = (None, "low", "high")
AVERAGE = "average"


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
class TablePart(Part):
    """What a version of a table has of its own."""

    metrics: dict[str, MetricSpec] = field(default_factory=dict)  # if any, they replace all


@dataclass
class TableConfig(ItemConfig):
    """conf/table/*.yaml."""

    number: int = MISSING
    metrics: dict[str, MetricSpec] = field(default_factory=dict)
    rows: list[str] = MISSING  # axes, "metric" among them
    columns: list[str] = MISSING
    compare: str | None = None  # the axis over which the best is found
    average: str | None = None  # the axis that gets a mean
    paper: dict[str, str] = field(default_factory=dict)  # column of the published file: axis
    mini: TablePart = field(default_factory=TablePart)
    fast: TablePart = field(default_factory=TablePart)


@dataclass(frozen=True)
class Table(Item):
    """A table for its models: the paper's, or the miniature, perhaps the fast one."""

    config: TableConfig
    metrics: Mapping[str, MetricSpec]

    @property
    def called(self) -> str:
        return f"Table {self.config.number}"

    @property
    def stem(self) -> str:
        return f"table{self.config.number:02d}"

    @property
    def command(self) -> str:
        return f"make table{self.config.number} MODEL={MINIATURE}"

    @property
    def subject(self) -> str:
        return self.config.title

    def values(self, axis: str) -> list[str]:
        """An axis's values in order, the average's row last."""
        if axis == METRIC:
            return list(self.metrics)
        average = [AVERAGE] if axis == self.config.average else []
        return [*self.sweep.axes[axis], *average]


def read_table(node: DictConfig, model: str | None, fast: bool) -> Table:
    """The table that a configuration describes, for its own models or the one that is named.

    Raises UserError for a model that the table does not have, and OmegaConf's error for a key that
    no table has.
    """
    config = read_config(node, TableConfig)
    called = f"Table {config.number}"
    sweep = read_sweep(config, called, model, fast)
    metrics = config.metrics
    for part in version_parts(config, sweep.models, called, fast):
        if isinstance(part, TablePart):
            metrics = part.metrics or metrics
    table = Table(sweep, config, metrics)
    _check(table)
    return table


def _check(table: Table) -> None:
    config, where = table.config, f"conf/table of {table.called}"
    axes = (*table.sweep.axes, METRIC)
    laid_out = [*config.rows, *config.columns]
    named = [*laid_out, *config.paper.values()]
    named += [axis for axis in (config.compare, config.average) if axis is not None]
    named += [axis for skip in table.sweep.skip for axis in skip.when]
    check_axes(where, named, axes)
    lost = [axis for axis in axes if len(table.values(axis)) > 1 and axis not in laid_out]
    if lost:
        raise UserError(f"{where}: {', '.join(lost)} is in neither rows nor columns")
    for name, spec in table.metrics.items():
        scopes = ("seconds", "peak_memory_mb") if spec.of == COST else SCOPES
        for key, value, allowed in (
            ("scope", spec.scope, scopes),
            ("better", spec.better, BETTER),
        ):
            if value not in allowed:
                words = ", ".join(str(each or "null") for each in allowed)
                raise UserError(
                    f"{where}: metrics.{name}.{key}={value} is not allowed; choose one of {words}"
                )
