"""Probes with pictures: the edited model completes what the unedited one drew.

They look past the text (Lu et al. 2025, "When Are Concepts Erased From Diffusion Models?", arXiv
2505.17013): a model that only avoids what the prompt asks for goes on with what it sees. The
control is given pictures of another concept; what it reaches, the prompt does without them.

Each has one try, along the first-order sampler of the attribution, without fresh noise, at the
sampler's steps and the prompts' guidance. A picture is read through the autoencoder again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.sampling import draw_noise, guided_step
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import Victims
from evaluation.attacks.probe import Probe
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import to_pixels


@dataclass(frozen=True, kw_only=True)
class Completion(Probe):
    """From the picture's latents x_0 to the image that is judged."""

    iterations: int = field(default=0, init=False)

    def pictured(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        if self.other is None:
            return list(prompts)
        return [replace(prompt, text=self.other) for prompt in prompts]

    def check(self, model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
        super().check(model, prompts)
        model.check_prompts([p.text for p in self.pictured(prompts) if not p.truncate])

    @torch.no_grad()
    def drawn(self, model: DiffusionModel, edit: WeightEdit, victims: Victims) -> Pixels:
        x_0 = victims.latents(model)  # (N, C, h, w)
        with edit.applied(model):
            return to_pixels(model.decode_latents(self.completed(model, victims, x_0)))[0]

    def completed(self, model: DiffusionModel, victims: Victims, x_0: Tensor) -> Tensor:
        """The latents (N, C, h, w) that the model makes of x_0."""
        sampler, guidance = model.sampler(victims.settings.steps, "ddim"), victims.settings.guidance
        skipped = self.skipped(len(sampler.timesteps))
        timesteps = sampler.timesteps[skipped:]
        noise = draw_noise(model, victims.generators, victims.size)
        pure = noise * sampler.init_sigma  # a noised picture would show through
        x_t = model.add_noise(x_0, noise, timesteps[0]) if skipped else pure
        empty = victims.unconditional.expand(len(x_0))
        both = Conditioning.cat([empty, victims.conditioning])  # (2N, ...)
        given = ~self.hidden(*x_0.shape[2:]).to(x_0.device)  # (h, w)
        for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            x_t = guided_step(model, sampler, x_t, t, both, guidance, None)
            known = x_0 if after is None else model.add_noise(x_0, noise, after)
            x_t = torch.where(given, known, x_t)
        return x_t

    @abstractmethod
    def skipped(self, steps: int) -> int:
        """How many of the first steps are left out."""

    def hidden(self, height: int, width: int) -> Tensor:
        """What of a picture is not given at every step, (height, width) bool: all."""
        return torch.ones(height, width, dtype=torch.bool)
