"""ESD (Gandikota et al. 2023, Erasing Concepts from Diffusion Models): fine-tunes the denoiser.

Its prediction for the concept's text c is to become what leads away from the concept,

    Phi(x_t, c, t) -> Phi*(x_t, "", t) - eta (Phi*(x_t, c, t) - Phi*(x_t, "", t)),

with Phi* the original model (the loop is `baselines.training`'s). x_t is where the model in
training gets to from pure noise, sampling the concept with guidance up to a random step.

Phi is the network in its own parameterisation. The target is an affine combination of predictions
at one x_t, and there v and epsilon differ by eps = alpha_t v + sigma_t x_t: the same x_0 is aimed
at; the squared error of v is that of epsilon divided by alpha_t^2, and that of the clean latent
by (alpha_t / sigma_t)^2.

All walks of an optimiser step are one batch, in which every element has its own noise, concept and
random step, and leaves at that step.

Where publication and releases differ or are silent: t is the sampler's own timestep at which x_t
lies (in the first release x_t is two sampler steps further on its way than the timesteps that t is
drawn from); "noxattn" is every parameter without `.attn2.` in its
name (releases leave some out); of several concepts each element draws one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from baselines.training import Course, Lesson, Trained, Weights, with_weights
from cad.checks import check, finite, one_of
from cad.concepts import Concept
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.models.sampler import Sampler
from cad.sampling import draw_below, draw_noise, guide, make_generators

TEXTS = ("text", "prompt")  # of a concept


@dataclass(frozen=True, kw_only=True)
class ESD(Trained):
    """The method with its settings; UserError for a value that is not allowed."""

    name: ClassVar[str] = "esd"

    trained_on: str = "text"  # "text": `Concept.text`, the word itself, as released | "prompt"
    negative_guidance: float = 1.0  # eta
    guidance: float = 3.0  # classifier-free, on the way to x_t

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "edit", trained_on=one_of(TEXTS), negative_guidance=finite, guidance=finite)

    def texts(self, concepts: Sequence[Concept]) -> list[str]:
        """What stands for each concept."""
        return [getattr(concept, self.trained_on) for concept in concepts]

    def course(
        self, model: DiffusionModel, concepts: Sequence[Concept], originals: Weights
    ) -> Course:
        prompts = model.encode_prompts(self.texts(concepts))  # (K, ...)
        empty = model.encode_prompts([""])  # (1, ...)

        def lesson(i: int, weights: Weights) -> Lesson:
            x_t, t, c = self.reached(model, i, weights, prompts, empty)

            def target(part: slice) -> Tensor:
                state = x_t[part], t[part], c[part]
                return erased_target(model, *state, empty, self.negative_guidance)

            return Lesson(x_t, t, c, target)

        return Course(lesson)

    def reached(
        self,
        model: DiffusionModel,
        i: int,
        weights: Weights,
        prompts: Conditioning,
        empty: Conditioning,
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """x_t (M, C, h, w), t (M,) and c (M, ...) of an optimiser step."""
        generators = make_generators(range(self.states), salt=f"{self.name}-{self.seed}-{i}")
        stops = draw_below(self.steps, generators)  # (M,)
        c = prompts[draw_below(len(prompts), generators).to(model.device)]  # (M, ...)
        sampler = model.sampler(self.steps, "ddim", eta=0.0)
        way = model, sampler, generators, stops, c, empty, self.guidance
        x_t, t = with_weights(model.denoiser, weights, walk_apart, *way)
        return x_t, t, c


@torch.no_grad()
def erased_target(
    model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, empty: Conditioning, eta: float
) -> Tensor:
    """Phi_u - eta (Phi_c - Phi_u) of the model as it is; (N, C, h, w) float32, without gradient.

    Classifier-free guidance by -eta. x_t (N, C, h, w), t (N,), c (N, ...), empty (1, ...).
    """
    phi_u, phi_c = _predict_both(model, x_t, t, c, empty)
    return guide(phi_u.float(), phi_c.float(), -eta)


@torch.no_grad()
def walk_apart(
    model: DiffusionModel,
    sampler: Sampler,
    generators: Sequence[Generator],
    stops: Tensor,
    c: Conditioning,
    unconditional: Conditioning,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """`cad.sampling.walk` of N elements, each of which leaves after its own number of steps.

    stops (N,) int64 on the CPU, below the sampler's steps; c (N, ...), unconditional (1, ...).
    Returns x_t (N, C, h, w), as the network takes it, and t (N,). The sampler must be first-order,
    since the batch shrinks on the way, and draw no noise.
    """
    x_t = draw_noise(model, generators) * sampler.init_sigma  # (N, C, h, w)
    reached = torch.empty_like(x_t)
    walking = torch.arange(len(stops))  # numbers of the n elements still on their way
    for index, t in enumerate(sampler.timesteps):
        x_in = sampler.scale(x_t, t)  # (n, C, h, w)
        stays = stops[walking] > index  # (n,)
        reached[walking[~stays]] = x_in[~stays]
        walking, x_t, x_in = walking[stays], x_t[stays], x_in[stays]
        if not len(walking):
            break
        phi_u, phi_c = _predict_both(model, x_in, t, c[walking], unconditional)
        x_t = sampler.step(guide(phi_u, phi_c, guidance), t, x_t, None)
    return reached, sampler.timesteps[stops.to(sampler.timesteps.device)]


def _predict_both(
    model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, unconditional: Conditioning
) -> tuple[Tensor, Tensor]:
    """Phi(x_t, "", t) and Phi(x_t, c, t), (N, C, h, w), in one batch; t () or (N,)."""
    both = Conditioning.cat([unconditional.expand(len(x_t)), c])  # (2N, ...)
    times = torch.cat([t, t]) if t.dim() else t
    phi_u, phi_c = model.predict(torch.cat([x_t, x_t]), times, both).chunk(2)
    return phi_u, phi_c
