"""Controls: CAD's selection and change, by scores that know nothing of the concept.

A score is worth what it adds to these at an equal share of weights: scores drawn at random (over
the model with `ratio.per=model`, within each layer with `ratio.per=layer`), the weights' magnitude,
and the scores of another concept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from cad.attribution import Scored
from cad.checks import check, text
from cad.components import component_weights
from cad.concepts import Concept
from cad.edits import CADErase
from cad.errors import UserError
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.objectives import Objective
from cad.sampling import make_generators


class _WithoutAttribution(CADErase):
    """Of the attribution only the group of components, the seed and the place are used."""

    @abstractmethod
    def score(self, weight: Tensor, generator: Generator) -> Tensor:
        """Scores (out, in) float32 of a weight (out, in)."""

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        component = self.attribution.component
        return {"component": component, "selection": self.selection.settings()}

    def scored(self, model: DiffusionModel, objective: Objective) -> Scored:
        weights = component_weights(model, self.attribution.component)
        salt = f"{self.name}-{objective.concept.name}"
        (generator,) = make_generators([self.attribution.seed], salt)  # on the CPU
        place = self.attribution.place(model)
        with measure(model.device) as meter:
            scores = {
                name: self.score(weight.detach().flatten(1), generator).to(place)
                for name, weight in weights.items()
            }
        return Scored(scores, meter.cost)


class RandomWeights(_WithoutAttribution):
    """Scores uniform in [0, 1), other ones for each concept and seed."""

    name = "random"

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return {**super().settings(concepts), "seed": self.attribution.seed}

    def score(self, weight: Tensor, generator: Generator) -> Tensor:
        return torch.rand(weight.shape, generator=generator)


class LargestWeights(_WithoutAttribution):
    """Scores |w|."""

    name = "magnitude"

    def score(self, weight: Tensor, generator: Generator) -> Tensor:
        return weight.float().abs()


@dataclass(eq=False)
class OtherConcept(CADErase):
    """Eq. 4's scores of another concept, by its prompt. UserError if that is the edited one's."""

    name = "other_concept"

    other: str = field(kw_only=True)  # its attribution prompt, c of Eq. 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "edit", other=text)

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        return super().settings([self._other(concept) for concept in concepts])

    def rankings(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Iterator[Scored]:
        return super().rankings(model, [self._other(concept) for concept in concepts])

    def _other(self, concept: Concept) -> Concept:
        if self.other.strip().lower() == concept.prompt.strip().lower():
            raise UserError(
                f"edit.other={self.other!r} is the prompt of concept={concept.name} itself: name "
                "another concept's."
            )
        return replace(concept, prompt=self.other)
