"""What an item of the paper is: a sweep of runs, for the paper's models or for the miniature.

The schema of what conf/table/*.yaml and conf/figure/*.yaml have in common.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

from cad.errors import UserError
from experiments.items.plan import Overrides, last_of_each_key

MINIATURE = "mini"
MODEL = "model"  # the axis that every item has

C = TypeVar("C", bound="ItemConfig")

Place = dict[str, str]
"""A value for each axis."""


@dataclass
class Skip:
    """Runs that are not attempted."""

    when: dict[str, str] = field(default_factory=dict)  # axis: value; all of them; {}: every run
    reason: str = MISSING


@dataclass
class Part:
    """What a version of an item has of its own."""

    runs: list[str] = field(default_factory=list)  # more overrides
    axes: dict[str, Any] = field(default_factory=dict)  # each replaces the axis of its name
    skip: list[Skip] = field(default_factory=list)  # more of them
    stands_for: dict[str, str] = field(default_factory=dict)  # value: the paper's in its place
    note: str = ""  # a sentence for the caption


@dataclass
class ItemConfig:
    """The keys that tables and figures share."""

    title: str = MISSING
    models: list[str] = MISSING  # the paper's
    runs: list[str] = field(default_factory=list)  # overrides of every run
    axes: dict[str, Any] = field(default_factory=dict)  # [value, ...] or {value: [override, ...]}
    skip: list[Skip] = field(default_factory=list)
    note: str = ""
    mini: Part = field(default_factory=Part)
    fast: Part = field(default_factory=Part)  # of the miniature's


@dataclass(frozen=True)
class Sweep:
    """An item's runs in one version: the paper's models', or the miniature's, perhaps the fast."""

    paper_models: tuple[str, ...]
    models: tuple[str, ...]
    runs: Overrides
    axes: Mapping[str, Mapping[str, Overrides]]  # axis: value: overrides
    skip: tuple[Skip, ...]
    stands_for: Mapping[str, str]
    notes: tuple[str, ...]
    fast: bool

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


@dataclass(frozen=True)
class Item(ABC):
    """A table or a figure: what is made of a sweep's results."""

    sweep: Sweep

    @property
    @abstractmethod
    def called(self) -> str:
        """As the paper calls it: "Table 1"."""

    @property
    @abstractmethod
    def stem(self) -> str:
        """What the names of its files begin with: "table01"."""

    @property
    @abstractmethod
    def command(self) -> str:
        """That makes its miniature: "make table1 MODEL=mini"."""

    @property
    @abstractmethod
    def subject(self) -> str:
        """What it shows, for its title."""

    @property
    def name(self) -> str:
        """Of its files: "table01-mini-fast"."""
        words = [self.stem, *self.sweep.models, *(["fast"] if self.sweep.fast else [])]
        return "-".join(words)

    @property
    def title(self) -> str:
        """ "Table 1, mini: accuracy of ..."."""
        return f"{self.called}, {' and '.join(self.sweep.models)}: {self.subject}"


def read_config(node: DictConfig, schema: type[C]) -> C:
    """A configuration of conf/ in its schema; OmegaConf's error for a key that the schema lacks."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    if not isinstance(config, schema):
        raise TypeError(f"a {schema.__name__} is a mapping, not {type(config).__name__}")
    return config


def read_sweep(config: ItemConfig, called: str, model: str | None, fast: bool) -> Sweep:
    """The sweep for the item's own models or the one that is named.

    Raises UserError for a model that the item does not have, or a fast version of the paper's.
    """
    models = _models(config, called, model)
    parts = version_parts(config, models, called, fast)
    axes: dict[str, dict[str, Overrides]] = {MODEL: {name: (f"{MODEL}={name}",) for name in models}}
    for given in (config.axes, *(part.axes for part in parts)):
        axes |= {str(axis): _axis(str(axis), values) for axis, values in given.items()}
    return Sweep(
        paper_models=tuple(config.models),
        models=models,
        runs=(*config.runs, *(each for part in parts for each in part.runs)),
        axes=axes,
        skip=(*config.skip, *(each for part in parts for each in part.skip)),
        stands_for={k: v for part in parts for k, v in part.stands_for.items()},
        notes=tuple(note for note in (config.note, *(part.note for part in parts)) if note),
        fast=fast,
    )


def version_parts(
    config: ItemConfig, models: tuple[str, ...], called: str, fast: bool
) -> list[Part]:
    """What the models' version adds to the paper's, in order. UserError for a fast paper's."""
    if models == (MINIATURE,):
        return [config.mini, *([config.fast] if fast else [])]
    if fast:
        raise UserError(
            f"fast=true is the miniature's: {called} of {', '.join(models)} has one size. Make it "
            "smaller with filter=..., or take model=mini"
        )
    return []


def parse_filter(text: str, axes: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """ "concept=church edit=uce,rece" as {axis: values}. UserError for what the item has not."""
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


def check_axes(where: str, named: Sequence[str], axes: Collection[str]) -> None:
    """Raise UserError for a name that is no axis."""
    unknown = [axis for axis in named if axis not in axes]
    if unknown:
        raise UserError(f"{where}: {', '.join(unknown)} is no axis; the axes are {', '.join(axes)}")


def _models(config: ItemConfig, called: str, model: str | None) -> tuple[str, ...]:
    if model is None:
        return tuple(config.models)
    if model not in (*config.models, MINIATURE):
        raise UserError(
            f"model={model}: {called} is of {' and '.join(config.models)}; its miniature is "
            f"model={MINIATURE}"
        )
    return (model,)


def _axis(axis: str, values: Any) -> dict[str, Overrides]:
    if isinstance(values, Mapping):
        return {str(name): tuple(overrides) for name, overrides in values.items()}
    return {str(value): (f"{axis}={value}",) for value in values}
