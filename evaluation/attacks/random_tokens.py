"""The control of the other attacks: tokens drawn at random, as often as those are tried.

What it reaches, the prompt's neighbourhood and the judge give away to anybody; only what an attack
reaches beyond it was found by the model's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from cad.checks import steps
from cad.models.base import DiffusionModel
from cad.models.conditioning import TokenSpace
from evaluation.attacks.base import Victims
from evaluation.attacks.search import Aim, TokenAttack


class RandomTokens(TokenAttack):
    """Variables: places of k tokens among the usable ones, (k,), drawn anew after each failure."""

    name: ClassVar[str] = "random_tokens"
    optimises: ClassVar[bool] = False

    def __init__(self, *, tokens: int, tries: int, retokenize: bool, batch_size: int) -> None:
        """UserError for values below 1."""
        super().__init__(
            tokens=tokens,
            timesteps=steps("attacks.random_tokens.tries", tries),
            iterations=0,
            optimizer="adam",
            lr=1.0,
            weight_decay=0.0,
            retokenize=retokenize,
            batch_size=batch_size,
        )

    def aim(self, model: DiffusionModel, victims: Victims) -> Aim:
        return lambda step, rows: []

    def start(self, space: TokenSpace, generator: Generator) -> Tensor:
        return torch.randint(len(space.usable), (self.tokens,), generator=generator).float()

    def renew(self, space: TokenSpace, variables: Tensor, generator: Generator) -> None:
        with torch.no_grad():
            variables.copy_(self.start(space, generator))

    def embed(
        self, space: TokenSpace, variables: Tensor, generators: Sequence[Generator]
    ) -> Tensor:
        return space.vocabulary[self.discretise(space, variables)].float()  # (n, k, D)

    @torch.no_grad()
    def discretise(self, space: TokenSpace, variables: Tensor) -> Tensor:
        return space.usable.to(variables.device)[variables.long()]  # (n, k)
