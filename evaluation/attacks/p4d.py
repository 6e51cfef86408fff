"""P4D, Prompting4Debugging (Chin et al. 2024, arXiv 2309.06135).

k free embeddings; at each forward pass that of the nearest token takes the place of each, and the
gradient there is taken as if it were the free one's (as in Wen et al. 2023, "Hard Prompts Made
Easy"). Nearest is by cosine similarity: where weight decay shortens the free embeddings, a distance
would favour tokens of small norm.

The aim is the unedited model's prediction of the original prompt, Phi(x_t, c, t), at the states x_t
of its own trajectory for that prompt and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cad.models.base import DiffusionModel
from cad.models.conditioning import TokenSpace
from cad.sampling import draw_noise, guide, make_generators
from evaluation.attacks.base import Aim, Attack, Victims


class P4D(Attack):
    """Variables: k embeddings, (k, D), at first those of random tokens."""

    name: ClassVar[str] = "p4d"

    @torch.no_grad()
    def aim(self, model: DiffusionModel, victims: Victims) -> Aim:
        sampler = self.sampler(model)
        generators = make_generators(victims.seeds)  # the images' own noise
        x_t = draw_noise(model, generators, victims.size) * sampler.init_sigma  # (N, C, h, w)
        unconditional = victims.unconditional.expand(len(x_t))
        states, predictions = [], []
        for t in sampler.timesteps:
            x_in = sampler.scale(x_t, t)
            phi_c = model.predict(x_in, t, victims.conditioning)
            states.append(x_in)
            predictions.append(phi_c)
            guided = guide(model.predict(x_in, t, unconditional), phi_c, victims.settings.guidance)
            x_t = sampler.step(guided, t, x_t, generators)

        def recorded(step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            return states[step][list(rows)], predictions[step][list(rows)]

        return recorded

    def start(self, space: TokenSpace, generator: Generator) -> Tensor:
        chosen = torch.randint(len(space.usable), (self.schedule.tokens,), generator=generator)
        return space.vocabulary[space.usable[chosen].to(space.vocabulary.device)].float().cpu()

    def embed(
        self, space: TokenSpace, variables: Tensor, generators: Sequence[Generator]
    ) -> Tensor:
        ids = self.discretise(space, variables)
        nearest = space.vocabulary[ids].float()  # (n, k, D)
        return variables + (nearest - variables).detach()

    @torch.no_grad()
    def discretise(self, space: TokenSpace, variables: Tensor) -> Tensor:
        usable = space.usable.to(variables.device)  # (U,)
        directions = F.normalize(space.vocabulary[usable].float(), dim=-1)  # (U, D)
        return usable[(variables @ directions.T).argmax(dim=-1)]  # (n, k)
