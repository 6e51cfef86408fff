"""UnlearnDiffAtk (Zhang et al. 2024, arXiv 2310.11868).

k distributions over the vocabulary. At each forward pass a token is drawn from each; the gradient
goes straight through the draw, cut to [-1, 1] (hard-tanh). After each optimiser step the
distributions are projected onto the simplex. The tokens of an attack are the most probable ones.

The aim is the training target on x_0 alone, the unedited model's image of the same prompt and seed,
with fresh noise at every iteration, from image to noise: the paper's diffusion loss, which needs no
second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cad.models.base import DiffusionModel
from cad.models.conditioning import TokenSpace
from evaluation.attacks.base import Victims
from evaluation.attacks.search import Aim, TokenAttack


class UnlearnDiff(TokenAttack):
    """Variables: k distributions over the U usable tokens, (k, U), at first uniform."""

    name: ClassVar[str] = "unlearn_diff"
    version: ClassVar[int] = 2

    def aim(self, model: DiffusionModel, victims: Victims) -> Aim:
        x_0, visited = victims.latents(model), self.visited(model)  # (N, C, h, w), (timesteps,)

        def noised_anew(step: int, rows: Sequence[int]) -> Sequence[tuple[Tensor, Tensor]]:
            t, clean = visited[step], x_0[list(rows)]
            drawn = [victims.noised(model, clean, t, rows) for _ in range(self.iterations)]
            return [(x_t, model.target(clean, noise, t)) for x_t, noise in drawn]

        return noised_anew

    def start(self, space: TokenSpace, generator: Generator) -> Tensor:
        tokens = len(space.usable)
        return torch.full((self.tokens, tokens), 1 / tokens)

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


def project_onto_simplex(points: Tensor) -> Tensor:
    """The Euclidean projection of (..., V) float points onto {p >= 0, sum p = 1}, row by row.

    max(point - theta, 0) with the one theta of each row that makes the sum 1: exact, by sorting
    (Duchi et al. 2008, Fig. 1). The released bisection for theta converges to it.
    """
    shifted = points - points.amax(dim=-1, keepdim=True)  # (..., V); keeps small sums exact
    falling = shifted.sort(dim=-1, descending=True).values  # (..., V)
    excess = falling.cumsum(dim=-1) - 1  # (..., V), of the first j entries
    j = torch.arange(1, points.shape[-1] + 1, device=points.device)  # (V,)
    support = (falling * j > excess).sum(dim=-1, keepdim=True)  # (..., 1), entries above 0
    theta = excess.gather(-1, support - 1) / support  # (..., 1)
    return (shifted - theta).clamp(min=0)
