"""P4D, Prompting4Debugging (Chin et al. 2024, arXiv 2309.06135).

k free embeddings; at each forward pass that of the nearest token takes the place of each, and the
gradient there is taken as if it were the free one's (as in Wen et al. 2023, "Hard Prompts Made
Easy"). Nearest is by cosine similarity: where weight decay shortens the free embeddings, a distance
would favour tokens of small norm.

The aim is the unedited model's prediction of the original prompt, Phi(x_t, c, t). The states x_t
are its image of that prompt and seed with fresh noise at every iteration, from image to noise, as
released; or, fixed and from noise to image, those of its own trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cad.checks import check, one_of
from cad.models.base import DiffusionModel
from cad.models.conditioning import TokenSpace
from cad.sampling import draw_noise, guide, make_generators
from evaluation.attacks.base import Victims
from evaluation.attacks.search import Aim, TokenAttack

States = Callable[[int, Sequence[int]], list[Tensor]]
"""(step, rows) -> x_t (n, C, h, w) of each iteration; a single one if it is that of all."""


@dataclass(frozen=True, kw_only=True)
class P4D(TokenAttack):
    """Variables: k embeddings, (k, D), at first those of random tokens."""

    name: ClassVar[str] = "p4d"
    version: ClassVar[int] = 2

    states: str  # "image": noised anew at every iteration | "trajectory": fixed

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "attacks.p4d", states=one_of(("image", "trajectory")))

    @property
    def uses_images(self) -> bool:
        return self.states == "image"

    def visited(self, model: DiffusionModel) -> Tensor:
        if self.states == "image":
            return super().visited(model)
        return model.sampler(self.timesteps, "ddim").timesteps

    def aim(self, model: DiffusionModel, victims: Victims) -> Aim:
        source = self._on_image if self.states == "image" else self._on_trajectory
        states, visited = source(model, victims), self.visited(model)

        def predicted(step: int, rows: Sequence[int]) -> Sequence[tuple[Tensor, Tensor]]:
            c = victims.conditioning[torch.tensor(rows)]
            wanted = [(x_t, model.predict(x_t, visited[step], c)) for x_t in states(step, rows)]
            return wanted * (self.iterations // len(wanted))

        return predicted

    def _on_image(self, model: DiffusionModel, victims: Victims) -> States:
        x_0, visited = victims.latents(model), self.visited(model)

        def noised_anew(step: int, rows: Sequence[int]) -> list[Tensor]:
            given = (model, x_0[list(rows)], visited[step], rows)
            return [victims.noised(*given)[0] for _ in range(self.iterations)]

        return noised_anew

    @torch.no_grad()
    def _on_trajectory(self, model: DiffusionModel, victims: Victims) -> States:
        sampler = model.sampler(self.timesteps, "ddim")
        generators = make_generators(victims.seeds)  # the images' own noise
        x_t = draw_noise(model, generators, victims.size) * sampler.init_sigma  # (N, C, h, w)
        unconditional = victims.unconditional.expand(len(x_t))
        passed = []
        for t in sampler.timesteps:
            x_in = sampler.scale(x_t, t)
            passed.append(x_in)
            phi_c = model.predict(x_in, t, victims.conditioning)
            guided = guide(model.predict(x_in, t, unconditional), phi_c, victims.settings.guidance)
            x_t = sampler.step(guided, t, x_t, generators)
        return lambda step, rows: [passed[step][list(rows)]]

    def start(self, space: TokenSpace, generator: Generator) -> Tensor:
        chosen = torch.randint(len(space.usable), (self.tokens,), generator=generator)
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
