"""UnlearnDiffAtk (Zhang et al. 2024, arXiv 2310.11868).

k distributions over the vocabulary. At each forward pass a token is drawn from each; the gradient
goes straight through the draw, cut to [-1, 1] (hard-tanh). After each optimiser step the
distributions are projected onto the simplex. The tokens of an attack are the most probable ones.

The aim is the training target on x_0 alone, the unedited model's image of the same prompt and seed,
with fresh noise at every iteration: the paper's diffusion loss, which needs no second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cad.models.base import DiffusionModel
from cad.sampling import Sampler, draw_noise, sample_latents
from cad.token_space import TokenSpace
from evaluation.attacks.base import Aim, Attack, Victims
from evaluation.attacks.simplex import project_onto_simplex


@dataclass(frozen=True)
class DiffusionLoss(Aim):
    """x_0, (N, C, h, w), noised anew at each call."""

    model: DiffusionModel
    sampler: Sampler
    victims: Victims
    x_0: Tensor

    def at(self, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        t, x_0 = self.sampler.timesteps[step], self.x_0[list(rows)]
        generators = [self.victims.generators[row] for row in rows]
        noise = draw_noise(self.model, generators, self.victims.size)  # (n, C, h, w)
        x_t = self.model.add_noise(x_0, noise, t)
        return self.sampler.scale(x_t, t), self.model.target(x_0, noise, t)


class UnlearnDiff(Attack):
    """Variables: k distributions over the U usable tokens, (k, U), at first uniform."""

    name: ClassVar[str] = "unlearn_diff"

    @torch.no_grad()
    def aim(self, model: DiffusionModel, victims: Victims) -> Aim:
        x_0 = sample_latents(
            model,
            victims.conditioning,
            victims.unconditional,
            victims.seeds,
            steps=victims.settings.steps,
            guidance=victims.settings.guidance,
            kind=victims.settings.kind,
            size=victims.size,
        )
        return DiffusionLoss(model, self.sampler(model), victims, x_0)

    def start(self, space: TokenSpace, generator: Generator) -> Tensor:
        tokens = len(space.usable)
        return torch.full((self.schedule.tokens, tokens), 1 / tokens)

    def embed(
        self, space: TokenSpace, variables: Tensor, generators: Sequence[Generator]
    ) -> Tensor:
        usable = space.usable.to(variables.device)  # (U,)
        chosen = _draw(variables.detach(), generators)  # (n, k), places among the usable
        one_hot: Tensor = _StraightThrough.apply(variables, chosen)  # (n, k, U)
        return one_hot @ space.vocabulary[usable].float()  # (n, k, D)

    @torch.no_grad()
    def confine(self, variables: Tensor) -> None:
        variables.copy_(project_onto_simplex(variables))

    def discretise(self, space: TokenSpace, variables: Tensor) -> Tensor:
        return space.usable.to(variables.device)[variables.argmax(dim=-1)]  # (n, k)


class _StraightThrough(torch.autograd.Function):
    """One-hot forwards; backwards the gradient as it comes, cut to [-1, 1]."""

    @staticmethod
    def forward(_context: Any, variables: Tensor, chosen: Tensor) -> Tensor:
        return F.one_hot(chosen, variables.shape[-1]).to(variables.dtype)  # (n, k, U)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return F.hardtanh(gradients[0]), None


def _draw(distributions: Tensor, generators: Sequence[Generator]) -> Tensor:
    """A sample (n, k) from distributions (n, k, U), each prompt with its own generator."""
    drawn = [
        torch.multinomial(each.cpu(), 1, generator=generator).squeeze(-1)  # (k,)
        for each, generator in zip(distributions, generators, strict=True)
    ]
    return torch.stack(drawn).to(distributions.device)
