"""Pictures with noise, as a network is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor

from cad.concepts import of_prompt
from cad.models.base import DiffusionModel
from cad.references import GeneratedImages
from cad.sampling import draw_below, draw_noise


@dataclass(frozen=True)
class Noised:
    """Noised pictures: x_t and the training's target (N, C, h, w), t (N,), and whose they are."""

    x_t: Tensor
    t: Tensor
    target: Tensor  # float32
    prompt: Tensor  # (N,) int64, the numbers of their prompts


@dataclass(frozen=True)
class Pictures:
    """Latents (K, R, C, h, w) of R pictures of each of K prompts."""

    latents: Tensor

    @classmethod
    @torch.no_grad()
    def draw(cls, model: DiffusionModel, prompts: Sequence[str], how: GeneratedImages) -> Self:
        """What the model, as it is, draws for the prompts."""
        return cls(torch.stack([how.latents(model, of_prompt(each)) for each in prompts]))

    def noised(self, model: DiffusionModel, steps: int, generators: Sequence[Generator]) -> Noised:
        """A picture for each generator, with noise of a random one of the sampler's `steps`."""
        prompt = draw_below(len(self.latents), generators)  # (N,)
        number = draw_below(self.latents.shape[1], generators)
        timesteps = model.sampler(steps, "ddim").timesteps
        t = timesteps[draw_below(len(timesteps), generators).to(timesteps.device)]
        x_0 = self.latents[prompt.to(model.device), number.to(model.device)]  # (N, C, h, w)
        noise = draw_noise(model, generators)
        x_t, target = model.add_noise(x_0, noise, t), model.target(x_0, noise, t)
        return Noised(x_t, t, target.float(), prompt)
