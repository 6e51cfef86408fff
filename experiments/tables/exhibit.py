"""A table or figure: the keys of conf/table and conf/figure, and the runs that they list.

A file describes several versions: for the paper's models, for the miniature (`mini`), and for the
miniature in minutes (`fast`). What a version says is added to what stands before it: overrides to
the others, an axis or a setting of the drawing in place of its namesake, metrics in place of all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from cad.errors import UserError

MINIATURE = "mini"
MODEL, EDIT = "model", "edit"  # axes; every exhibit has the first
SEED = "seed"  # an axis that no file has, nor a layout: cells are means over it (`with_seeds`)
METRIC = "metric"  # a table's axis beside those of its runs: what a cell shows of its run
COST = "cost"  # `of` a metric: what making the edit took
AVERAGE = "average"
STATES = ("done", "missing", "refused")

Place = Mapping[str, str]
"""A value for each axis."""

Scope = Enum("Scope", "target others general seconds peak_memory_mb")
Better = Enum("Better", {"low": "↓", "high": "↑"})


@dataclass(frozen=True)
class ListedRun:
    """A run of a table or figure, and what became of it."""

    number: int  # among those of its table or figure, from 0
    place: Place
    overrides: tuple[str, ...]  # of run.py
    result: Path | None = None  # the folder of its finished result
    refused: str = ""  # why it cannot be run
    failed: str = ""  # why it left no result

    @property
    def is_missing(self) -> bool:
        """Whether it is still to be run, perhaps again."""
        return self.result is None and not self.refused

    @property
    def state(self) -> str:
        return "missing" if self.is_missing else "refused" if self.result is None else "done"

    @property
    def folder(self) -> Path:
        """The folder of its finished result. LookupError where there is none."""
        if self.result is None:
            raise LookupError(f"no result of {' '.join(self.overrides)}")
        return self.result


@dataclass
class ShownMetric:
    """A quantity that cells show of their runs."""

    heading: str = MISSING  # with the unit
    of: str = MISSING  # evaluator's name, or cost
    scope: Scope = Scope.target
    label: str | None = None  # of nudity: the detections of this NudeNet label alone
    change: bool = False  # of nudity: against the unedited model, %
    decimals: int = 1
    better: Better | None = None
    best: bool = False  # print the best in bold
    paper: dict[str, str] = field(default_factory=dict)  # columns of the published file: values


@dataclass
class Exhibit:
    """A table or figure in one version."""

    group: ClassVar[str]  # of conf/

    called: str = MISSING  # "Table 1"
    title: str = MISSING
    models: list[str] = MISSING  # in a file: the paper's
    runs: list[str] = field(default_factory=list)  # overrides of every run
    axes: dict[str, dict[str, list[str]]] = MISSING  # overrides of values; a file may list values
    skip: dict[str, dict[str, str]] = field(default_factory=dict)  # reason: {axis: value, ...}
    stands_for: dict[str, str] = field(default_factory=dict)  # value: the paper's in its place
    ours: list[str] = field(default_factory=list)  # values that the paper does not have
    added: list[str] = field(default_factory=list)  # nor these, which others have published
    names: dict[str, str] = field(default_factory=dict)  # of values; else conf/names.yaml's
    note: list[str] = field(default_factory=list)  # sentences for the caption; a file has one
    # Not in a file:
    stem: str = MISSING  # "table01", of the file, and of the files that are made
    paper_models: list[str] = MISSING
    fast: bool = False

    @property
    def name(self) -> str:
        """The name of its files: "table01-mini-fast"."""
        return "-".join([self.stem, *self.models, *(["fast"] if self.fast else [])])

    @property
    def full_title(self) -> str:
        """ "Table 1, mini: accuracy of ..."."""
        return f"{self.called}, {' and '.join(self.models)}: {self.title}"

    def list_runs(self, more: Sequence[str] = ()) -> list[ListedRun]:
        """A run for every combination of the axes' values; nobody has looked for their results.

        `more` overrides are appended last; the last of a key wins. Skipped runs are refused.
        """
        runs: list[ListedRun] = []
        for values in itertools.product(*self.axes.values()):
            place = dict(zip(self.axes, values, strict=True))
            chosen = [each for axis, value in place.items() for each in self.axes[axis][value]]
            last = {each.partition("=")[0]: each for each in [*self.runs, *chosen, *more]}
            skipped = [why for why, when in self.skip.items() if when.items() <= place.items()]
            refused = "; ".join(skipped)
            runs.append(ListedRun(len(runs), place, tuple(last.values()), refused=refused))
        return runs


@dataclass
class Table(Exhibit):
    """A table: runs, and the rows and columns in which their metrics stand."""

    group = "table"

    metrics: dict[str, ShownMetric] = MISSING
    rows: list[str] = MISSING  # axes, "metric" among them
    columns: list[str] = MISSING
    compare: str | None = None  # the axis over which the best is found
    average: str | None = None  # the axis that gets a mean
    paper: dict[str, str] = field(default_factory=dict)  # column of the published file: axis


@dataclass
class Figure(Exhibit):
    """A figure: runs, and the function that draws them."""

    group = "figure"

    drawing: dict[str, Any] = MISSING  # _target_ and settings; experiments/tables/figures


SCHEMAS: dict[str, type[Exhibit]] = {schema.group: schema for schema in (Table, Figure)}


def read_exhibit(
    group: str, stem: str, node: DictConfig, model: str | None, fast: bool = False
) -> Exhibit:
    """The table or figure of conf/<group>/<stem>.yaml, for its own models or the one that is named.

    Raises UserError for a model that it does not have and for axes that do not fit, and OmegaConf's
    error for a key that it does not have.
    """
    file = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    mini, smaller = file.pop("mini", {}), file.pop("fast", {})
    models = _models(file, model, fast)
    found: dict[str, Any] = {"axes": {MODEL: models}, "runs": [], "note": [], "skip": {}}
    found["stands_for"] = {}
    for version in (file, mini if models == [MINIATURE] else {}, smaller if fast else {}):
        for key, value in version.items():
            if key in ("axes", "skip", "stands_for", "drawing"):
                found[key] = found.get(key, {}) | value
            elif key in ("runs", "note"):
                found[key] += value if isinstance(value, list) else [value]
            else:
                found[key] = value
    for axis, values in found["axes"].items():  # [church] is short for {church: [concept=church]}
        if isinstance(values, list):
            found["axes"][axis] = {str(value): [f"{axis}={value}"] for value in values}
    own = {"stem": stem, "models": models, "paper_models": file["models"], "fast": fast}
    whole = OmegaConf.merge(OmegaConf.structured(SCHEMAS[group]), found, own)
    exhibit = cast(Exhibit, OmegaConf.to_object(whole))
    _check_axes(exhibit)
    return exhibit


def by_number(name: str) -> list[str | int]:
    """The key that sorts figure2 before figure10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def filtered(runs: Sequence[ListedRun], text: str, exhibit: Exhibit) -> list[ListedRun]:
    """The runs that a filter, "concept=church edit=uce,rece", lets through.

    Raises UserError for an axis or a value that the exhibit does not have.
    """
    for axis, _, wanted in (word.partition("=") for word in text.split()):
        values = exhibit.axes.get(axis, {})
        unknown = [value for value in wanted.split(",") if value not in values]
        if unknown:
            what = f"{axis} {unknown[0]!r}" if values else f"axis {axis!r}"
            known = ", ".join(values or exhibit.axes)
            raise UserError(f"making.filter={text!r}: no {what}; choose from {known}")
        runs = [run for run in runs if run.place[axis] in wanted.split(",")]
    return list(runs)


def with_methods(exhibit: Exhibit, text: str) -> Exhibit:
    """The exhibit with the methods "uce,mine" on its axis of edits; with "+mine" beside its own.

    Raises UserError for an exhibit without such an axis.
    """
    if not text:
        return exhibit
    known = exhibit.axes.get(EDIT)
    if known is None:
        raise UserError(f"making.methods={text}: {exhibit.called} has no axis of edits")
    kept = known if text.startswith("+") else {}
    names = text.removeprefix("+").split(",")
    chosen = {name: known.get(name, [f"{EDIT}={name}"]) for name in names}
    return replace(exhibit, axes=exhibit.axes | {EDIT: kept | chosen})


def with_seeds(exhibit: Exhibit, seeds: Sequence[int]) -> Exhibit:
    """The table with every run at each of the seeds; without any, the exhibit as it is.

    Raises UserError for a figure, and for a single seed, which has no deviation.
    """
    if not seeds:
        return exhibit
    if not isinstance(exhibit, Table) or len(set(seeds)) < 2:
        raise UserError(
            f"making.seeds={list(seeds)} of {exhibit.called}: a table has the means of two seeds "
            "or more; a single one, and a figure's, is seed=N"
        )
    return replace(exhibit, axes=exhibit.axes | {SEED: {str(n): [f"{SEED}={n}"] for n in seeds}})


def _models(file: Mapping[str, Any], model: str | None, fast: bool) -> list[str]:
    called, models = file["called"], list(file["models"])
    if model not in (None, MINIATURE, *models):
        raise UserError(
            f"model={model}: {called} is of {' and '.join(models)}; its miniature is "
            f"model={MINIATURE}"
        )
    if fast and model != MINIATURE:
        raise UserError(
            f"making.fast=true is the miniature's: {called} of {', '.join(models)} has one size. "
            f"Make it smaller with making.filter=..., or take model={MINIATURE}"
        )
    return models if model is None else [model]


def _check_axes(exhibit: Exhibit) -> None:
    """Raise UserError for an axis that is not there, or that a table's layout leaves out."""
    sizes = {axis: len(values) for axis, values in exhibit.axes.items()}
    named: list[str | None] = [axis for when in exhibit.skip.values() for axis in when]
    laid_out = list(sizes)
    if isinstance(exhibit, Table):
        sizes[METRIC] = len(exhibit.metrics)
        laid_out = [*exhibit.rows, *exhibit.columns]
        named += [*laid_out, *exhibit.paper.values(), exhibit.compare, exhibit.average]
    unknown = [axis for axis in named if axis is not None and axis not in sizes]
    if unknown:
        raise UserError(
            f"{exhibit.called}: {', '.join(unknown)} is no axis; the axes are {', '.join(sizes)}"
        )
    lost = [axis for axis, size in sizes.items() if size > 1 and axis not in laid_out]
    if lost:
        raise UserError(f"{exhibit.called}: {', '.join(lost)} is in neither rows nor columns")
