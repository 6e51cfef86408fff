"""SalUn (Fan et al. 2024, arXiv 2310.12508): relabels a concept, in the weights that matter for it.

The mask: those weights whose gradient of the forgetting loss is largest, half of them as released,

    m = |grad of sum -||(1 + g) Phi(x_t, c, t) - g Phi(x_t, "", t) - target||^2| >= gamma,

the sum over noised pictures x_t of the concept c, gamma the threshold of that share. Then, in the
mask alone, c is trained to be answered as another concept's prompt c' is, and kept prompts k as
before:

    ||Phi(x_t, c, t) - sg Phi(x_t, c', t)||^2 + alpha ||Phi(x_t', k, t) - target||^2,

where sg is the network as it is then, without gradient, and x_t' noised pictures of k.

Ours: pictures that the unedited model draws, where the release has ImageNet's for objects (for
nudity it draws them too); noise at the sampler's timesteps; the prompts are the attribution's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.training import Course, Lesson, Trained, Weights, seen, trained_weights
from cad.attribution import GRADIENT_RMS, backward_scale, summed_gradients
from cad.checks import check, finite, not_negative, ratio, text, texts
from cad.concepts import Concept, beside
from cad.errors import UserError
from cad.identity import material
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.noised import Noised, Pictures
from cad.references import GeneratedImages
from cad.sampling import guide, make_generators
from cad.selection import floor_share


@dataclass(frozen=True, kw_only=True)
class SalUn(Trained):
    """The method with its settings; UserError for a value that is not allowed."""

    name: ClassVar[str] = "salun"

    other: str  # c', the prompt that the concept is answered as
    preserve: Sequence[str]  # prompts k; those of the erased concepts are left out
    pictures: GeneratedImages  # of each prompt
    share: float = 0.5  # of the weights, in the mask; 1: all
    retain_scale: float = 0.5  # alpha
    guidance: float = 7.5  # g, in the mask's loss

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "edit", other=text, preserve=texts, share=ratio, guidance=finite)
        check(self, "edit", retain_scale=not_negative)

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        kept = beside(self.preserve, concepts)
        if not kept or not beside([self.other], concepts):
            raise UserError(
                f"edit.other={self.other!r} and edit.preserve={list(self.preserve)} name prompts "
                "beside what is erased: at least one of each."
            )
        pictures = dict(self.pictures.settings(concepts[0]))
        return material(self) | {"preserve": kept, "pictures": pictures}

    def texts(self, concepts: Sequence[Concept]) -> list[str]:
        return [*(each.prompt for each in concepts), self.other, *beside(self.preserve, concepts)]

    def course(
        self, model: DiffusionModel, concepts: Sequence[Concept], originals: Weights
    ) -> Course:
        self.settings(concepts)  # refuses prompts
        prompts = [each.prompt for each in concepts], beside(self.preserve, concepts)
        forgotten, kept = (Pictures.draw(model, each, self.pictures) for each in prompts)
        c, k = (model.encode_prompts(each) for each in prompts)
        other = model.encode_prompts([self.other])  # (1, ...)

        def lesson(i: int, weights: Weights) -> Lesson:
            generators = make_generators(range(2 * self.states), f"{self.name}-{self.seed}-{i}")
            first = forgotten.noised(model, self.steps, generators[: self.states])
            second = kept.noised(model, self.steps, generators[self.states :])
            as_other = other.expand(self.states)
            targets = torch.cat(
                [seen(model, weights, first.x_t, first.t, as_other), second.target]
            )  # (2 M, C, h, w)
            weight = torch.ones(2, self.states, device=model.device)
            weight[1] = self.retain_scale
            return Lesson(
                torch.cat([first.x_t, second.x_t]),
                torch.cat([first.t, second.t]),
                Conditioning.cat([c[_on(first)], k[_on(second)]]),
                targets.__getitem__,
                weight.flatten(),
            )

        return Course(lesson, self._masks(model, forgotten, c))

    def _masks(
        self, model: DiffusionModel, pictures: Pictures, c: Conditioning
    ) -> dict[str, Tensor]:
        """{name: bool} of the trained weights; {} for a share of 1."""
        if self.share == 1.0:
            return {}
        weights = trained_weights(model, self.parameters)
        empty = model.encode_prompts([""])
        count = pictures.latents.shape[0] * pictures.latents.shape[1]
        generators = make_generators(range(count), salt=f"{self.name}-mask-{self.seed}")
        with summed_gradients(weights, model.device) as gradients, torch.enable_grad():
            for start in range(0, count, self.batch_size):
                at = pictures.noised(model, self.steps, generators[start : start + self.batch_size])
                phi_u = model.predict(at.x_t, at.t, empty.expand(len(at.t)))
                phi_c = model.predict(at.x_t, at.t, c[_on(at)])
                found = guide(phi_u, phi_c, 1 + self.guidance)
                gradient = 2 * (at.target - found.detach().float())  # of minus the squared error
                scale = backward_scale(gradient, GRADIENT_RMS)
                gradients.factor = 1 / scale
                found.backward((scale * gradient).to(found.dtype))
        return largest({name: each.abs() for name, each in gradients.items()}, self.share)


def largest(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which entries of all tensors together are among the largest share; with ties, more."""
    together = torch.cat([each.flatten() for each in values.values()])
    k = max(1, floor_share(share, len(together)))
    cut = together.kthvalue(len(together) - k + 1).values
    return {name: each >= cut for name, each in values.items()}


def _on(at: Noised) -> Tensor:
    """Whose the pictures are, (N,), on their device."""
    return at.prompt.to(at.x_t.device)
