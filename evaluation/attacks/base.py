"""The contract of an attack: what it is given, and what becomes of each prompt.

An attack brings an erased concept back, or fails to: for each prompt it has the edited model draw
an image, which a judge looks at. Prompts are attacked in batches, but each has its own random
generator, so what is found for one does not depend on the others beyond float rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from cad.checks import check, flag, whole
from cad.errors import UserError
from cad.identity import Identified, immaterial, material
from cad.models.base import DiffusionModel, check_gradient_checkpointing
from cad.models.conditioning import Conditioning
from cad.sampling import draw_noise, make_generators, sample_latents
from cad.weight_edit import WeightEdit
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings

Judge = Callable[[Pixels, Sequence[Prompt]], list[bool]]
"""Which images, (N, H, W, 3) uint8 RGB, show what their prompts' groups name."""

VERSION = 2  # of all attacks: raise it when equal settings find something else


@dataclass(frozen=True, eq=False)
class Outcome:
    """The end of an attack on one prompt."""

    success: bool
    timesteps: int  # tries: of a search, how many timesteps it went through
    timestep: int | None  # the last of them
    tokens: list[int]  # adversarial ids, as they were at the end
    text: str | None  # of the whole adversarial prompt
    retokenizes: bool | None  # whether the text gives these very ids
    losses: list[float | None]  # of every iteration; None where not finite
    image: Pixels = field(repr=False)  # (H, W, 3) RGB, of the last try


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
    """A way to bring a concept back. Raises UserError for values out of range."""

    name: ClassVar[str]  # as in conf/attack/NAME.yaml

    iterations: int  # optimiser steps in a try
    batch_size: int  # prompts attacked at once
    gradient_checkpointing: bool = immaterial(False)  # less memory, more time

    def __post_init__(self) -> None:
        place = f"attacks.{self.name}"
        check(self, place, batch_size=whole(1), gradient_checkpointing=flag)

    def settings(self) -> dict[str, Any]:
        """All that determines what is found beside model and prompts; JSON-able."""
        return {"attack": self.name, "version": self.version, **material(self)}

    @property
    def tries(self) -> int:
        """Images for each prompt, at most."""
        return 1

    @property
    def uses_images(self) -> bool:
        """Whether it looks at the unedited model's images, of the prompts that `pictured` gives."""
        return True

    def pictured(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts whose images it looks at, one for each that is attacked."""
        return list(prompts)

    def check(self, model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a model or prompts that it cannot work with."""
        key = f"attacks.{self.name}.gradient_checkpointing"
        check_gradient_checkpointing(model, self.gradient_checkpointing, key)

    @abstractmethod
    def outcomes(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        victims: Victims,
        judge: Judge,
        progress: tqdm[Any],
    ) -> list[Outcome]:
        """What becomes of each victim. Leaves the model, which is unedited, as found.

        `progress` counts tries. The text encoder is on the model's device.
        """


def attempt(
    model: DiffusionModel,
    edit: WeightEdit,
    attack: Attack,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    judge: Judge,
    progress: tqdm[Any],
    images: Pixels | None = None,
) -> list[Outcome]:
    """The outcome of any attack on each prompt, all of one size; `settings` have their guidance.

    `images`, (N, H, W, 3), are what the attack looks at (`Attack.pictured`), if it does. Leaves
    model and random state as found. `progress` counts tries. Raises UserError for prompts without
    room for the tokens, or a GPU without memory for the batch.
    """
    try:
        with model.encoding():
            salt = f"attack-{type(attack).name}"  # a control draws what its attack does
            victims = Victims.of(model, prompts, settings, salt, images)
            return attack.outcomes(model, edit, victims, judge, progress)
    except torch.OutOfMemoryError as error:
        key = f"attacks.{attack.name}"
        raise UserError(
            f"the GPU's memory does not hold an attack on {len(prompts)} prompts at once: lower "
            f"{key}.batch_size, or set {key}.gradient_checkpointing=true"
        ) from error
