"""The contract of an attack: its variables, and the predictions that they are to bring about.

An attack prepends k tokens to a prompt; the schedule that all share is in
`evaluation.attacks.search`. Prompts are attacked in batches, but each has its own variables, random
generator and loss, so what is found for one does not depend on the others beyond float rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from cad.checks import check, flag, not_negative, one_of, positive, steps, whole
from cad.identity import Identified, immaterial, material
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning, TokenSpace
from cad.sampling import draw_noise, make_generators, sample_latents
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings

MOST_TOKENS = 75  # CLIP's text encoders take 77, with start and end
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

Aim = Callable[[int, Sequence[int]], Sequence[tuple[Tensor, Tensor]]]
"""The predictions that an attack wants of the edited model, asked of the unedited one.

(step, rows) -> for each iteration at the timestep `step`, counted from 0: x_t as the network takes
it, and the wanted prediction there, both (n, C, h, w), for the victims `rows`. Asked once for each
timestep, without gradient. May draw from the victims' generators.
"""


@dataclass(frozen=True)
class Victims:
    """Prompts of one size and guidance that are attacked together, with all that is theirs."""

    prompts: tuple[Prompt, ...]
    conditioning: Conditioning  # of the original prompts, (N, ...)
    unconditional: Conditioning  # (1, ...)
    settings: SamplerSettings  # with the prompts' guidance
    generators: list[Generator]  # each prompt's own, for all that its attack draws
    images: Pixels | None  # the unedited model's, (N, H, W, 3), for attacks that use them

    @property
    def size(self) -> tuple[int, int] | None:
        return self.prompts[0].size

    @property
    def seeds(self) -> list[int]:
        return [prompt.seed for prompt in self.prompts]

    def sampled(self, model: DiffusionModel, c: Conditioning, rows: Sequence[int]) -> Tensor:
        """x_0 latents (n, C, h, w) of the victims `rows`, as the conditioning c (n, ...) has it."""
        return sample_latents(
            model,
            c,
            self.unconditional,
            [self.seeds[row] for row in rows],
            steps=self.settings.steps,
            guidance=self.settings.guidance,
            kind=self.settings.kind,
            eta=self.settings.eta,
            size=self.size,
        )

    @torch.no_grad()
    def latents(self, model: DiffusionModel) -> Tensor:
        """x_0 of the images, (N, C, h, w): the image encoder's mean."""
        if self.images is None:
            raise ValueError("the attack uses the unedited model's images, and was given none")
        each = [torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in self.images]
        return torch.cat([model.encode_images(image) for image in each])

    def noised(
        self, model: DiffusionModel, x_0: Tensor, t: Tensor, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """x_t of the victims `rows`, whose images are x_0 (n, C, h, w), and its fresh noise."""
        noise = draw_noise(model, [self.generators[row] for row in rows], self.size)
        return model.add_noise(x_0, noise, t), noise  # (n, C, h, w) both

    @classmethod
    def of(
        cls,
        model: DiffusionModel,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        salt: str,
        images: Pixels | None = None,
    ) -> Victims:
        """`settings` have the prompts' guidance; `salt` sets apart what different attacks draw."""
        texts = [prompt.text for prompt in prompts]
        conditioning = model.encode_prompts(texts, truncate=True, apart=True)
        generators = make_generators([prompt.seed for prompt in prompts], salt)
        unconditional = model.encode_prompts([""])
        return cls(tuple(prompts), conditioning, unconditional, settings, generators, images)


@dataclass(frozen=True, kw_only=True)
class Attack(Identified, ABC):
    """A way to look for adversarial tokens: how long and how fast, and by which variables.

    Variables are float32, one tensor for each prompt. Raises UserError for values out of range.
    """

    name: ClassVar[str]  # as in conf/attack/NAME.yaml
    optimises: ClassVar[bool] = True  # False: no iterations, and no states to have them at

    tokens: int  # k, prepended to the prompt
    timesteps: int  # that it goes through, each with a try in the end
    iterations: int  # optimiser steps at each of them
    optimizer: str  # "adam": weight decay is a part of the gradient (L2) | "adamw": decoupled
    lr: float
    weight_decay: float
    retokenize: bool  # the text of the tokens is tried, as the tokenizer reads it; False: their ids
    batch_size: int  # prompts attacked at once
    gradient_checkpointing: bool = immaterial(False)  # less memory, more time

    def __post_init__(self) -> None:
        place, iterations = f"attacks.{self.name}", whole(1 if self.optimises else 0)
        check(self, place, tokens=whole(1, MOST_TOKENS), timesteps=steps, iterations=iterations)
        check(self, place, optimizer=one_of(OPTIMIZERS), lr=positive, weight_decay=not_negative)
        check(self, place, retokenize=flag, batch_size=whole(1), gradient_checkpointing=flag)

    def settings(self) -> dict[str, Any]:
        """All that determines what is found beside model and prompts; JSON-able."""
        return {"attack": self.name, "version": self.version, **material(self)}

    @property
    def uses_images(self) -> bool:
        """Whether it looks at the unedited model's images of the prompts."""
        return self.optimises

    def visited(self, model: DiffusionModel) -> Tensor:
        """The timesteps in their order, (timesteps,) int64. UserError for what a sampler lacks.

        The released ones: the middles of equal parts of the training's, from image to noise.
        """
        most = model.sampler(1, "ddim").training_timesteps
        part = most // self.timesteps
        return torch.arange(part // 2, most, part, device=model.device)[: self.timesteps]

    @abstractmethod
    def aim(self, model: DiffusionModel, victims: Victims) -> Aim:
        """The wanted predictions; called once for a batch, while the model is unedited."""

    @abstractmethod
    def start(self, space: TokenSpace, generator: Generator) -> Tensor:
        """The free variables of one prompt at first, (k, ...), float32 on the CPU."""

    @abstractmethod
    def embed(
        self, space: TokenSpace, variables: Tensor, generators: Sequence[Generator]
    ) -> Tensor:
        """Embeddings (n, k, D) that the variables (n, k, ...) stand for; differentiable in them."""

    @torch.no_grad()
    def confine(self, variables: Tensor) -> None:
        """Bring one prompt's variables, (k, ...), back to where they are allowed, in place."""
        return None

    def renew(self, space: TokenSpace, variables: Tensor, generator: Generator) -> None:
        """Change one prompt's variables, (k, ...), in place after a failure; most stay."""
        return None

    @abstractmethod
    def discretise(self, space: TokenSpace, variables: Tensor) -> Tensor:
        """The tokens (n, k), int64, of the variables (n, k, ...)."""
