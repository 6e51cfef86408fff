"""The contract of every way to edit a model, and CAD's own edits (paper Sec. 5, Algorithms 1, 2).

An edit is called with a model and concepts and returns a `WeightEdit`: a value. A new method (a
baseline, a user's own) subclasses `Edit` and says what its settings are and what it changes;
provenance is done here, once for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cad.attribution import Attribution
from cad.components import component_weights
from cad.concepts import Concept
from cad.errors import UserError
from cad.instrument import Cost, measure
from cad.models.base import DiffusionModel
from cad.objectives import AmplifyObjective, EraseObjective, Objective, check_weighting
from cad.references import References
from cad.runtime import describe_runtime
from cad.score_store import Scored, ScoreStore, compute_scores
from cad.selection import Selection
from cad.weight_edit import Change, Scale, WeightEdit, Zero


@dataclass(frozen=True)
class Made:
    """What `Edit.make` found: changes by parameter name, what finding them cost, and how it went.

    `cost` (`cad.instrument.measure`) is the method's own work, no hashing or storing; work taken
    from a cache counts with its original cost. `history` is one JSON-able record per step of a
    method that trains, empty for the others.
    """

    changes: Mapping[str, Change]
    cost: Cost = field(default_factory=Cost)
    history: Sequence[Mapping[str, float]] = ()


class Edit(ABC):
    """A way to edit a model: `edit(model, concept) -> WeightEdit`.

    Deterministic for its settings; leaves the model and the global random state as found.
    """

    name: ClassVar[str]  # as in conf/edit/NAME.yaml
    version: ClassVar[int] = 1  # raise it when the edits of equal settings change

    def __call__(self, model: DiffusionModel, concept: Concept, *more: Concept) -> WeightEdit:
        """The changes that erase or amplify the concept, or several at once, with their cost.

        Does not apply them. Raises UserError, before work is spent, where the method cannot be
        used on this model, this concept, or several concepts.
        """
        concepts = (concept, *more)
        provenance = self.provenance(model, concepts)
        made = self.make(model, concepts)
        return WeightEdit(made.changes, provenance, made.cost, tuple(made.history))

    def provenance(self, model: DiffusionModel, concepts: Sequence[Concept]) -> dict[str, Any]:
        """Everything that determines the edit; JSON-able. Raises UserError as `settings`."""
        return {
            "model": model.provenance(),
            "edit": self.name,
            "version": self.version,
            "settings": dict(self.settings(concepts)),
            "concepts": [asdict(each) for each in concepts],
            **describe_runtime(model.device),
        }

    def clean_up(self, model: DiffusionModel, concepts: Sequence[Concept]) -> None:
        """Delete what `make` kept on disk to go on from, now that the edit itself is stored."""
        return None

    @abstractmethod
    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        """Everything that determines the edit beside model and concepts; JSON-able.

        Asked for before the work; raises UserError for what is missing.
        """

    @abstractmethod
    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Made:
        """Find the changes, and leave the model as it was found, also after an exception.

        Raises UserError, before work is spent, for a model or concepts that the method cannot do.
        """


class NoEdit(Edit):
    """The unedited model, as a row of every table."""

    name = "none"

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {}

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Made:
        return Made({})


class ScoredEdit(Edit):
    """Attribute, select, change. Several concepts: each its own scores, then all that was chosen.

    `store` keeps the scores on disk; None computes them every time.
    """

    sign: ClassVar[int]  # +1 chooses the most positive components, -1 the most negative

    def __init__(
        self, attribution: Attribution, selection: Selection, store: ScoreStore | None = None
    ) -> None:
        self.attribution = attribution
        self.selection = selection
        self.store = store

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {
            "attribution": self.attribution.settings(),
            "selection": asdict(self.selection),
            "objectives": [dict(self.objective(concept).describe()) for concept in concepts],
        }

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Made:
        self.selection.check(component_weights(model, self.attribution.component))
        objectives = [self.objective(concept) for concept in concepts]
        chosen: dict[str, Tensor] = {}
        cost = Cost()
        for objective in objectives:
            scored = self.scored(model, objective)
            with measure(model.device) as selecting:
                for name, indices in self.selection.indices(scored.scores, self.sign).items():
                    chosen[name] = _union(chosen[name], indices) if name in chosen else indices
            cost += scored.cost + selecting.cost
        return Made({name: self.change(_compact(each)) for name, each in chosen.items()}, cost)

    @abstractmethod
    def objective(self, concept: Concept) -> Objective:
        """J whose components are chosen from."""

    @abstractmethod
    def change(self, indices: Tensor) -> Change:
        """What becomes of the chosen components."""

    def scored(self, model: DiffusionModel, objective: Objective) -> Scored:
        """What is chosen from: scores from the store, or computed (and kept, if there is one)."""
        if self.store is None:
            return compute_scores(model, objective, self.attribution)
        return self.store.scored(model, objective, self.attribution)


class _ErasingEdit(ScoredEdit):
    """Chooses by Eq. 4. `weighting` of its timesteps: "model" | "epsilon" (`EraseObjective`)."""

    def __init__(
        self,
        attribution: Attribution,
        selection: Selection,
        store: ScoreStore | None = None,
        weighting: str = "model",
    ) -> None:
        super().__init__(attribution, selection, store)
        check_weighting(weighting)
        self.weighting = weighting

    def objective(self, concept: Concept) -> Objective:
        return EraseObjective(concept, self.weighting)


class CADErase(_ErasingEdit):
    """Algorithm 1: zeroes the components that promote the concept most (Eq. 4's positive ones)."""

    name = "erase"
    sign = +1

    def change(self, indices: Tensor) -> Change:
        return Zero(indices)


class CADAmplify(ScoredEdit):
    """Algorithm 2: zeroes the components that suppress the concept most (Eq. 5's negative ones)."""

    name = "amplify"
    sign = -1

    def __init__(
        self,
        attribution: Attribution,
        selection: Selection,
        references: References,
        store: ScoreStore | None = None,
    ) -> None:
        super().__init__(attribution, selection, store)
        self.references = references

    def objective(self, concept: Concept) -> Objective:
        return AmplifyObjective(concept, self.references)

    def change(self, indices: Tensor) -> Change:
        return Zero(indices)


class CADRescale(_ErasingEdit):
    """Table 11: erases by strengthening what suppresses: Eq. 4's negative components x factor.

    Raises UserError unless factor > 1 (the paper: 1.5, 2, 3).
    """

    name = "rescale"
    sign = -1

    def __init__(
        self,
        attribution: Attribution,
        selection: Selection,
        factor: float,
        store: ScoreStore | None = None,
        weighting: str = "model",
    ) -> None:
        super().__init__(attribution, selection, store, weighting)
        if not 1.0 < factor < float("inf"):
            raise UserError(f"edit.factor={factor} is not allowed; it must be greater than 1.")
        self.factor = float(factor)  # 2 and 2.0 are one edit

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {**super().settings(concepts), "factor": self.factor}

    def change(self, indices: Tensor) -> Change:
        return Scale(indices, self.factor)


def _union(first: Tensor, second: Tensor) -> Tensor:
    merged: Tensor = torch.cat([first, second]).unique()
    return merged  # ascending


def _compact(indices: Tensor) -> Tensor:
    """int32 where it suffices, which halves the edit's file."""
    fits = indices.max().item() <= torch.iinfo(torch.int32).max
    return indices.to(torch.int32 if fits else torch.int64)
