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

from cad.checks import check, flag, not_negative, positive, whole
from cad.identity import Identified, immaterial
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning, TokenSpace
from cad.models.sampler import Sampler
from cad.sampling import make_generators, sample_latents
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings

Aim = Callable[[int, Sequence[int]], tuple[Tensor, Tensor]]
"""The predictions that an attack wants of the edited model, recorded from the unedited one.

(step, rows) -> x_t as the network takes it, and the wanted prediction there; both (n, C, h, w), for
the victims `rows` at the timestep `step`, counted from 0. May draw from their generators.
"""


@dataclass(frozen=True, kw_only=True)
class Schedule(Identified):
    """How long and how fast an attack searches."""

    tokens: int  # k, prepended to the prompt
    timesteps: int  # of a DDIM trajectory, evenly spaced, from noise to image
    iterations: int  # optimiser steps at each of them
    lr: float  # AdamW's learning rate
    weight_decay: float  # AdamW's, decoupled from the gradient
    batch_size: int  # prompts attacked at once
    gradient_checkpointing: bool = immaterial(False)  # less memory, more time


@dataclass(frozen=True)
class Victims:
    """Prompts of one size and guidance that are attacked together, with all that is theirs."""

    prompts: tuple[Prompt, ...]
    conditioning: Conditioning  # of the original prompts, (N, ...)
    unconditional: Conditioning  # (1, ...)
    settings: SamplerSettings  # with the prompts' guidance
    generators: list[Generator]  # each prompt's own, for all that its attack draws

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
            size=self.size,
        )

    @classmethod
    def of(
        cls, model: DiffusionModel, prompts: Sequence[Prompt], settings: SamplerSettings, salt: str
    ) -> Victims:
        """`settings` have the prompts' guidance; `salt` sets apart what different attacks draw."""
        texts = [prompt.text for prompt in prompts]
        conditioning = model.encode_prompts(texts, truncate=True, apart=True)
        generators = make_generators([prompt.seed for prompt in prompts], salt)
        unconditional = model.encode_prompts([""])
        return cls(tuple(prompts), conditioning, unconditional, settings, generators)


class Attack(Identified, ABC):
    """A way to look for adversarial tokens. Variables are float32, one tensor for each prompt."""

    name: ClassVar[str]  # as in conf/attack/NAME.yaml
    optimises: ClassVar[bool] = True  # False: no iterations, the aim is not asked

    def __init__(self, **schedule: Any) -> None:
        """The fields of `Schedule`. Raises UserError for values out of range."""
        self.schedule = Schedule(**schedule)
        key, iterations = f"attacks.{self.name}", whole(1 if self.optimises else 0)
        check(self.schedule, key, tokens=whole(1), timesteps=whole(1), iterations=iterations)
        check(self.schedule, key, lr=positive, weight_decay=not_negative, batch_size=whole(1))
        check(self.schedule, key, gradient_checkpointing=flag)

    def settings(self) -> dict[str, Any]:
        """All that determines what is found beside model and prompts; JSON-able."""
        return {"attack": self.name, "version": self.version, **self.schedule.settings()}

    def sampler(self, model: DiffusionModel) -> Sampler:
        """The sampler whose timesteps the attack goes through. UserError if there are too many."""
        return model.sampler(self.schedule.timesteps, "ddim")

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
