"""Concept Ablation (Kumari et al. 2023, arXiv 2303.13516), model-based: train it onto an anchor.

Prompts with the concept, c*, are to be answered as their anchors without, c: with x_t a noised
picture of c that the unedited model drew,

    ||Phi(x_t, c*, t) - sg Phi(x_t, c, t)||^2 + lambda ||Phi(x_t, c, t) - target||^2,

where sg is the network as it is then, without gradient, and the second term, off by default, the
loss that it was trained with, on the anchor.

Ours: pairs of prompts as ConceptPrune has them; the paper asks a language model for prompts with a
superordinate noun ("dog" for "grumpy cat"), which `base_template` and `concept_template` can say.
Plain Adam (the release decays weights too), no augmentation, noise at the sampler's timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from baselines.prompt_pairs import PromptPairs
from baselines.training import Course, Lesson, Trained, Weights, seen
from cad.checks import check, not_negative
from cad.concepts import Concept, of_prompt
from cad.identity import material
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.noised import Pictures
from cad.references import GeneratedImages
from cad.sampling import draw_below, make_generators


@dataclass(frozen=True, kw_only=True)
class ConceptAblation(Trained, PromptPairs):
    """The method with its settings; UserError for a value that is not allowed."""

    name: ClassVar[str] = "concept_ablation"

    pictures: GeneratedImages  # of each anchor prompt
    prior_scale: float = 0.0  # lambda

    def __post_init__(self) -> None:
        Trained.__post_init__(self)
        PromptPairs.__post_init__(self)
        check(self, "edit", prior_scale=not_negative)

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        anchors, _ = self.prompts(concepts[0])
        return material(self) | {"pictures": dict(self.pictures.settings(of_prompt(anchors[0])))}

    def texts(self, concepts: Sequence[Concept]) -> list[str]:
        return [each for concept in concepts for part in self.prompts(concept) for each in part]

    def course(
        self, model: DiffusionModel, concepts: Sequence[Concept], originals: Weights
    ) -> Course:
        anchors, _ = self.prompts(concepts[0])
        pictures = Pictures.draw(model, anchors, self.pictures)
        c = model.encode_prompts(anchors)  # (F, ...)
        told = Conditioning.cat([model.encode_prompts(self.prompts(e)[1]) for e in concepts])

        def lesson(i: int, weights: Weights) -> Lesson:
            generators = make_generators(range(self.states), salt=f"{self.name}-{self.seed}-{i}")
            chosen = draw_below(len(concepts), generators)  # (M,)
            at = pictures.noised(model, self.steps, generators)
            c_star = told[(chosen * len(anchors) + at.prompt).to(model.device)]  # (M, ...)
            anchor = c[at.prompt.to(model.device)]  # (M, ...)
            target = seen(model, weights, at.x_t, at.t, anchor)
            if not self.prior_scale:
                return Lesson(at.x_t, at.t, c_star, target.__getitem__)
            targets = torch.cat([target, at.target])  # (2 M, C, h, w)
            both = Conditioning.cat([c_star, anchor])
            weight = torch.ones(2, len(target), device=model.device)
            weight[1] = self.prior_scale
            states = at.x_t.repeat(2, 1, 1, 1), at.t.repeat(2)
            return Lesson(*states, both, targets.__getitem__, weight.flatten())

        return Course(lesson)
