"""The contract of an attack: what it optimises, and towards what.

An attack prepends k tokens to a prompt. It says what its free variables are, how they become
embeddings and tokens, and which predictions the edited model is to make; the schedule that all
attacks share is in `evaluation.attacks.search`. Prompts are attacked in batches, but each has its
own variables, random generator and loss, so what is found for one does not depend on the others
beyond float rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from cad.errors import UserError
from cad.models.base import Conditioning, DiffusionModel
from cad.sampling import Sampler, make_generators
from cad.token_space import TokenSpace
from evaluation.generation import SamplerSettings
from evaluation.prompts import Prompt

MEMORY_ONLY = ("gradient_checkpointing",)  # changes memory and time, not what is found


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast an attack searches. UserError for values out of range."""

    tokens: int  # k, prepended to the prompt
    timesteps: int  # of a DDIM trajectory, evenly spaced, from noise to image
    iterations: int  # optimiser steps at each of them
    lr: float  # AdamW's learning rate
    weight_decay: float  # AdamW's, decoupled from the gradient
    batch_size: int  # prompts attacked at once
    gradient_checkpointing: bool = False

    def check(self, name: str, optimises: bool) -> None:
        """`name` is the attack's, for messages."""
        counts = ["tokens", "timesteps", "batch_size", *(["iterations"] if optimises else [])]
        for key in counts:
            if getattr(self, key) < 1:
                raise UserError(f"attacks.{name}.{key}={getattr(self, key)} must be at least 1")
        for key, least in (("lr", "above 0"), ("weight_decay", "0 or more")):
            value = getattr(self, key)
            if not math.isfinite(value) or value < 0 or (key == "lr" and value == 0):
                raise UserError(f"attacks.{name}.{key}={value} is not allowed; it is {least}")


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

    @classmethod
    def of(
        cls, model: DiffusionModel, prompts: Sequence[Prompt], settings: SamplerSettings, salt: str
    ) -> Victims:
        """`settings` have the prompts' guidance; `salt` sets apart what different attacks draw."""
        texts = [model.encode_prompts([prompt.text], truncate=True) for prompt in prompts]
        return cls(
            prompts=tuple(prompts),
            conditioning=Conditioning.cat(texts),
            unconditional=model.encode_prompts([""]),
            settings=settings,
            generators=make_generators([prompt.seed for prompt in prompts], salt),
        )


class Aim(ABC):
    """What the edited model is to predict, recorded from the unedited one."""

    @abstractmethod
    def at(self, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x_t as the network takes it, and the wanted prediction there; both (n, C, h, w).

        For the victims `rows` at the timestep `step`, counted from 0. May draw from their
        generators, so what it gives can differ from call to call.
        """


class Attack(ABC):
    """A way to look for adversarial tokens. Variables are float32, one tensor for each prompt."""

    name: ClassVar[str]  # as in conf/attack/NAME.yaml
    version: ClassVar[int] = 1  # raise it when equal settings find something else
    optimises: ClassVar[bool] = True  # False: no iterations, the aim is not asked

    def __init__(self, **schedule: Any) -> None:
        """The fields of `Schedule`. Raises UserError for values out of range."""
        self.schedule = Schedule(**schedule)
        self.schedule.check(self.name, self.optimises)

    def settings(self) -> dict[str, Any]:
        """Everything that determines what is found beside model and prompts; JSON-able."""
        kept = {k: v for k, v in asdict(self.schedule).items() if k not in MEMORY_ONLY}
        return {"attack": self.name, "version": self.version, **kept}

    def sampler(self, model: DiffusionModel) -> Sampler:
        """Whose timesteps the attack goes through. UserError if there are too many."""
        return model.sampler(self.schedule.timesteps, "ddim")

    @abstractmethod
    def aim(self, model: DiffusionModel, victims: Victims) -> Aim:
        """What to aim at; called once for a batch, while the model is unedited."""

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
