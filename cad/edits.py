"""The contract of every way to edit a model, and CAD's own edits (paper Sec. 5, Algorithms 1, 2).

A new method (a baseline, a user's own) subclasses `Edit` and says what its settings are and what
it changes; provenance is done here, once for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cad.attribution import Attribution, Scored, attribute
from cad.checks import check, number, one_of
from cad.components import component_weights
from cad.concepts import Concept
from cad.errors import UserError
from cad.identity import describe_runtime, material
from cad.instrument import Cost, measure
from cad.models.base import DiffusionModel
from cad.objectives import WEIGHTINGS, AmplifyObjective, EraseObjective, Objective
from cad.references import References
from cad.selection import Selection
from cad.store import Notes, Store
from cad.units import find_units
from cad.weight_edit import Change, Scale, WeightEdit, Zero


class Edit(ABC):
    """A way to edit a model: `edit(model, concept) -> WeightEdit`.

    Deterministic for its settings; leaves the model and the global random state as found.
    """

    name: ClassVar[str]  # as in conf/edit/NAME.yaml
    version: ClassVar[int] = 1  # raise it when the edits of equal settings change

    def __call__(self, model: DiffusionModel, concept: Concept, *more: Concept) -> WeightEdit:
        """The changes that erase or amplify the concept, or several at once; applies none of them.

        Raises UserError, before work is spent, where the method cannot be used on these.
        """
        edit, _ = make_edit(self, model, (concept, *more))
        return edit

    def identity(self, concepts: Sequence[Concept]) -> dict[str, Any]:
        """All that determines the edit beside model and machine; JSON-able. Loads no weights."""
        return {
            "edit": self.name,
            "version": self.version,
            "settings": dict(self.settings(concepts)),
            "concepts": [each.settings() for each in concepts],
        }

    def provenance(self, model: DiffusionModel, concepts: Sequence[Concept]) -> dict[str, Any]:
        """All that determines the edit; JSON-able."""
        found = {"model": model.provenance(), **self.identity(concepts)}
        return found | describe_runtime(model.device)

    @property
    def innermost(self) -> Edit:
        """The method that edits, where something is done to its edit afterwards; else itself."""
        return self

    def clean_up(self, model: DiffusionModel, concepts: Sequence[Concept]) -> None:
        """Deletes what `make` kept on disk to go on from, now that the edit itself is stored."""
        return None

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        """The method's settings, a dataclass's material fields; JSON-able.

        Asked for before the work; raises UserError for what is missing.
        """
        return material(self)

    @abstractmethod
    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        """Finds the changes, and leaves the model as it was found, also after an exception.

        `cost` (`cad.instrument.measure`) is the method's own work, no hashing or storing; work
        taken from a cache counts with its original cost. The provenance is added by `make_edit`.
        Raises UserError, before work is spent, for a model or concepts that the method cannot do.
        """


class NoEdit(Edit):
    """The unedited model, as a row of every table."""

    name = "none"

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {}

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        return WeightEdit({})


@dataclass(eq=False)
class ScoredEdit(Edit):
    """Attribute, select, change; of several concepts all that is chosen by each one's scores."""

    sign: ClassVar[int]  # +1 chooses the most positive components, -1 the most negative

    attribution: Attribution
    selection: Selection
    _: KW_ONLY
    store: Store | None = None  # keeps the scores on disk; None computes them every time

    @abstractmethod
    def objective(self, concept: Concept) -> Objective:
        """J of a concept, whose components are chosen from."""

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {
            "attribution": {"version": self.attribution.version, **self.attribution.settings()},
            "selection": self.selection.settings(),
            "objectives": [dict(self.objective(concept).settings()) for concept in concepts],
        }

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        weights = component_weights(model, self.attribution.component)
        units = find_units(model, weights, self.selection.unit)
        self.selection.check(weights, units)
        chosen: dict[str, Tensor] = {}
        cost = Cost()
        for scored in self.rankings(model, concepts):
            with measure(model.device) as selecting:
                found = self.selection.indices(scored.scores, self.sign, units)
                for name, indices in found.items():
                    if name in chosen:
                        indices = torch.cat([chosen[name], indices]).unique()  # ascending
                    chosen[name] = indices
            cost += scored.cost + selecting.cost
        with measure(model.device) as changing:
            changes = self.changes(model, concepts, chosen)
        return WeightEdit(changes, cost=cost + changing.cost)

    def rankings(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Iterator[Scored]:
        """What each concept's components are chosen by, one after another; cheap to drop."""
        for concept in concepts:
            yield self.scored(model, self.objective(concept))

    def scored(self, model: DiffusionModel, objective: Objective) -> Scored:
        """A concept's scores: the store's, or computed (and kept, if there is one)."""
        return attribute(model, objective, self.attribution, self.store)

    def changes(
        self, model: DiffusionModel, concepts: Sequence[Concept], chosen: Mapping[str, Tensor]
    ) -> dict[str, Change]:
        """What becomes of the weights; `chosen` has flat indices (k,) into each, ascending."""
        change = self.change
        compacted = {name: compact(indices) for name, indices in chosen.items()}
        return {name: change(indices) for name, indices in compacted.items()}

    @property
    def change(self) -> Callable[[Tensor], Change]:
        """From the chosen components' indices to their change: they are knocked out."""
        return Zero


@dataclass(eq=False)
class CADErase(ScoredEdit):
    """Algorithm 1: zeroes the components that promote the concept most (Eq. 4's positive ones).

    `weighting` of Eq. 4's timesteps: "model" | "epsilon" (`Objective`).
    """

    name = "erase"
    sign = +1

    weighting: str = "model"

    def __post_init__(self) -> None:
        check(self, "edit", weighting=one_of(WEIGHTINGS))

    def objective(self, concept: Concept) -> Objective:
        return EraseObjective(concept, self.weighting)


@dataclass(eq=False)
class CADAmplify(ScoredEdit):
    """Algorithm 2: zeroes the components that suppress the concept most (Eq. 5's negative ones).

    `weighting` of Eq. 5's timesteps: "model" | "epsilon" (`Objective`).
    """

    name = "amplify"
    sign = -1

    references: References
    weighting: str = "model"

    def __post_init__(self) -> None:
        check(self, "edit", weighting=one_of(WEIGHTINGS))

    def objective(self, concept: Concept) -> Objective:
        return AmplifyObjective(concept, self.references, self.weighting)


@dataclass(eq=False)
class CADRescale(CADErase):
    """Table 11: erases by strengthening what suppresses: Eq. 4's negative components x factor.

    Raises UserError unless factor > 1 (the paper: 1.5, 2, 3).
    """

    name = "rescale"
    sign = -1

    factor: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "edit", factor=number(lambda x: x > 1, "a finite number greater than 1"))

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {**super().settings(concepts), "factor": self.factor}

    @property
    def change(self) -> Callable[[Tensor], Change]:
        return partial(Scale, factor=self.factor)


def make_edit(
    method: Edit,
    model: DiffusionModel,
    concepts: Sequence[Concept],
    store: Store | None = None,
) -> tuple[WeightEdit, Path | None]:
    """The method's edit and its file: from the store, or made and kept there, if there is one.

    `cost.cached` tells which. Raises what `Edit.__call__` and `Store.get_or_make` raise.
    """
    key = method.provenance(model, concepts)

    def make() -> WeightEdit:
        try:
            made = method.make(model, concepts)
        except UserError as error:
            raise UserError(f"edit={method.name}: {error}") from error
        return replace(made, provenance=key | {"rounded": rounded_fingerprints(model)})

    if store is None:
        return make(), None
    found = store.get_or_make(key, f"the edit by {method.name}", _read, make, _write)
    method.clean_up(model, concepts)
    return found


def _read(path: Path, notes: Notes) -> WeightEdit:
    cost = replace(Cost(**notes["cost"]), cached=True)
    return replace(WeightEdit.load(path), cost=cost, history=tuple(notes["history"]))


def _write(path: Path, edit: WeightEdit) -> Notes:
    edit.save(path)
    return {"cost": asdict(edit.cost), "history": list(edit.history)}


def rounded_fingerprints(model: DiffusionModel) -> dict[str, str]:
    """Those of a float32 model's weights in half precision, by dtype; {} of another model."""
    if model.dtype != torch.float32:
        return {}
    return {dtype: model.rounded_fingerprint(dtype) for dtype in ("float16", "bfloat16")}


def compact(indices: Tensor) -> Tensor:
    """The indices (k,), k > 0, as int32 where it suffices, which halves an edit's file."""
    fits = indices.max().item() <= torch.iinfo(torch.int32).max
    return indices.to(torch.int32 if fits else torch.int64)
