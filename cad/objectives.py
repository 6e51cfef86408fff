"""The objective J whose sensitivity to each weight is attributed (paper Eq. 4 and Eq. 5).

Both compare, at one x_t after another, the network's prediction Phi(x_t, c, t) with a target that
no weight moves: J = sum of term(target, prediction), in the model's own parameterisation. So the
attribution, and the check of its predictions (`cad.effects`), need to know of no more than that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cad import trajectories
from cad.checks import one_of
from cad.concepts import Concept
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.references import References
from cad.sampling import draw_noise, make_generators
from cad.trajectories import NoisePlan

WEIGHTINGS = ("model", "epsilon")


@dataclass(frozen=True)
class Comparison:
    """Where J has a term, for a batch; x_t and target (N, C, h, w), t ()."""

    x_t: Tensor  # as the network takes it
    t: Tensor
    target: Tensor  # what Phi(x_t, c, t) is compared with; without gradient
    weight: float = 1.0  # what J multiplies this term by


Terms = Iterator[tuple[Comparison, Tensor]]
"""The comparisons of J, each with Phi(x_t, c, t) there."""


class Objective(ABC):
    """J(c, w) for one concept, estimated at the states of a `NoisePlan`.

    weighting "model" takes errors in the model's own parameterisation, "epsilon" those of the
    noises which the predictions stand for (`DiffusionModel.epsilon_weight`): the published form,
    also for a model that predicts v or x_0. Raises UserError for another weighting.
    """

    name: ClassVar[str]

    def __init__(self, concept: Concept, weighting: str = "model") -> None:
        self.concept = concept
        self.weighting = one_of(WEIGHTINGS)("edit.weighting", weighting)

    def weight(self, model: DiffusionModel, t: Tensor) -> float:
        """What J multiplies its term at timestep t () by."""
        return model.epsilon_weight(t) if self.weighting == "epsilon" else 1.0

    def conditioning(self, model: DiffusionModel) -> Conditioning:
        """c, (1, ...)."""
        return model.encode_prompts([self.concept.prompt])

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """All that determines J beside model and plan; JSON-able, part of the scores' key.

        Raises UserError if J cannot be formed for the concept.
        """

    @abstractmethod
    def terms(self, model: DiffusionModel, plan: NoisePlan) -> tuple[int, Terms]:
        """The comparisons of J with Phi(x_t, c, t) there, and how many there are.

        The caller's gradient mode decides whether predictions carry their graph. The sum of
        `Comparison.weight` times `term` over all of them is `plan.samples` times J.
        """

    @staticmethod
    @abstractmethod
    def term(target: Tensor, prediction: Tensor) -> Tensor:
        """The comparison's part in J before its weight, summed over the batch.

        (N, C, h, w) both -> () float32.
        """


class EraseObjective(Objective):
    """Eq. 4: J = sum over t of || sg(Phi(x_t, c_b, t)) - Phi(x_t, c, t) ||^2, mean over samples.

    x_t: DDIM with the concept's prompt. J measures how far the concept moves the prediction; a
    component with a positive score, removed, brings it nearer to the base prompt's.
    """

    name = "erase"

    def settings(self) -> Mapping[str, Any]:
        return {
            "objective": self.name,
            "prompt": self.concept.prompt,
            "base_prompt": self.concept.base_prompt,
            "weighting": self.weighting,
        }

    def terms(self, model: DiffusionModel, plan: NoisePlan) -> tuple[int, Terms]:
        return plan.count(plan.samples), self._terms(model, plan)

    def _terms(self, model: DiffusionModel, plan: NoisePlan) -> Terms:
        prompts = [self.concept.prompt, "", self.concept.base_prompt]
        c, unconditional, c_b = model.encode_prompts(prompts, apart=True).split()  # (1, ...) each
        for visit in trajectories.visits(model, plan, c, unconditional):
            target = visit.unconditional
            if self.concept.base_prompt:
                with torch.no_grad():
                    target = model.predict(visit.x_t, visit.t, c_b.expand(len(target)))
            weight = self.weight(model, visit.t)
            yield Comparison(visit.x_t, visit.t, target, weight), visit.conditional

    @staticmethod
    def term(target: Tensor, prediction: Tensor) -> Tensor:
        return (target.float() - prediction.float()).square().sum()


class AmplifyObjective(Objective):
    """Eq. 5: J = - mean squared error of Phi(x_t, c, t) against its training target.

    x_t: latents of reference images with noise, at each DDIM timestep of the plan; mean over
    latent elements, sum over timesteps and images, mean over `samples` noises. The published form
    compares with the noise; in another parameterisation the target is what that model predicts,
    and `weighting` "epsilon" makes the errors those of the noise again. The plan's guidance, eta
    and trajectory have no part in it.
    """

    name = "amplify"

    def __init__(self, concept: Concept, references: References, weighting: str = "model") -> None:
        super().__init__(concept, weighting)
        self.references = references

    def settings(self) -> Mapping[str, Any]:
        return {
            "objective": self.name,
            "prompt": self.concept.prompt,
            "references": dict(self.references.settings(self.concept)),
            "weighting": self.weighting,
        }

    def terms(self, model: DiffusionModel, plan: NoisePlan) -> tuple[int, Terms]:
        x_0 = self.references.latents(model, self.concept)  # (R, C, h, w)
        x_0 = x_0.repeat_interleave(plan.samples, dim=0)  # (R * samples, C, h, w)
        return plan.count(len(x_0)), self._terms(model, plan, x_0)

    def _terms(self, model: DiffusionModel, plan: NoisePlan, x_0: Tensor) -> Terms:
        c = self.conditioning(model)
        timesteps, counted = model.sampler(plan.steps, "ddim").timesteps, plan.counted()
        for batch in plan.batches(len(x_0)):
            generators = make_generators(batch, salt=f"amplify-{plan.seed}")
            clean = x_0[batch.start : batch.stop]  # (N, C, h, w)
            for index, t in enumerate(timesteps):
                noise = draw_noise(model, generators)
                if index not in counted:
                    continue
                x_t = model.add_noise(clean, noise, t)
                at = Comparison(x_t, t, model.target(clean, noise, t), self.weight(model, t))
                yield at, model.predict(x_t, t, c.expand(len(batch)))

    @staticmethod
    def term(target: Tensor, prediction: Tensor) -> Tensor:
        error = target.float() - prediction.float()
        return -error.square().flatten(1).mean(dim=1).sum()
