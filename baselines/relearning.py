"""Relearning: how soon a few pictures bring an erased concept back.

The edited weights are trained on, with the loss that the network was trained with, on pictures that
the unedited model drew of the concept. Another prompt's pictures (`prompt`) are the control: what
they bring back too was only loosely erased, by weights that any training moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from baselines.afterwards import Afterwards
from baselines.training import PARAMETERS, Course, Lesson, Trained, Weights, trained_weights
from cad.checks import check, one_of, optional, positive, seed, text, whole
from cad.concepts import Concept, of_prompt
from cad.models.base import DiffusionModel
from cad.noised import Pictures
from cad.references import GeneratedImages
from cad.sampling import make_generators
from cad.weight_edit import WeightEdit


@dataclass(frozen=True, kw_only=True)
class OnPictures(Trained):
    """Training with the network's own loss: ||Phi(x_t, c, t) - target||^2 on noised pictures."""

    name: ClassVar[str] = "relearned"

    prompts: Sequence[str]  # c
    pictures: Pictures = field(repr=False)

    def texts(self, concepts: Sequence[Concept]) -> list[str]:
        return list(self.prompts)

    def course(
        self, model: DiffusionModel, concepts: Sequence[Concept], originals: Weights
    ) -> Course:
        c = model.encode_prompts(self.prompts)  # (K, ...)

        def lesson(i: int, weights: Weights) -> Lesson:
            generators = make_generators(range(self.states), salt=f"{self.name}-{self.seed}-{i}")
            at = self.pictures.noised(model, self.steps, generators)
            return Lesson(at.x_t, at.t, c[at.prompt.to(model.device)], at.target.__getitem__)

        return Course(lesson)


@dataclass(frozen=True, eq=False, kw_only=True)
class Relearned(Afterwards):
    """Trains the edited model for some steps. UserError for a value that is not allowed."""

    step: ClassVar[str] = "relearned"

    pictures: GeneratedImages  # how the unedited model draws them
    iterations: int  # optimiser steps
    lr: float  # Adam's
    prompt: str | None = None  # whose pictures; None: each concept's own
    parameters: str = "full"  # a key of `training.PARAMETERS`
    steps: int = 50  # levels of noise
    batch_size: int = 4  # pictures in a step
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        place, counts = "after.relearned", ("iterations", "steps", "batch_size")
        check(self, place, **dict.fromkeys(counts, whole(1)), lr=positive, seed=seed)
        check(self, place, prompt=optional(text), parameters=one_of(PARAMETERS))

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        drawn = [dict(self.pictures.settings(of_prompt(c))) for c in self.prompts(concepts)]
        return {**super().settings(concepts), "pictures": drawn}

    def prompts(self, concepts: Sequence[Concept]) -> list[str]:
        """Those that the pictures are of."""
        return [each.prompt for each in concepts] if self.prompt is None else [self.prompt]

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        model.check_prompts(self.prompts(concepts))  # before the inner edit is made
        trained_weights(model, self.parameters)
        return super().make(model, concepts)

    def alter(
        self, model: DiffusionModel, concepts: Sequence[Concept], edit: WeightEdit
    ) -> WeightEdit:
        prompts = self.prompts(concepts)
        training = OnPictures(
            prompts=prompts,
            pictures=Pictures.draw(model, prompts, self.pictures),
            parameters=self.parameters,
            iterations=self.iterations,
            lr=self.lr,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        with edit.applied(model):
            made = training.make(model, concepts)
        return WeightEdit({**edit.changes, **made.changes}, history=made.history)
