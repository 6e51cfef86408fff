"""A learned token: one new embedding that the edited model draws the concept by.

Textual inversion (Gal et al. 2023, arXiv 2208.01618) against an edited model, as Pham et al. 2024
("Circumventing Concept Erasure Methods", arXiv 2308.01508): with x_t noised pictures of the
concept, which the unedited model drew, Adam minimises over the embedding v alone

    ||Phi_edited(x_t, <start> v <end>, t) - target||^2.

Every prompt is then the token alone, with the prompt's own seed. Ours: no words around it (theirs
are templates such as "a photo of v"), its own pictures (none of the attacked prompts', so that it
learns the concept and not an image), noise at the sampler's timesteps. The control is learned in as
many steps from pictures of another concept: how often any new vector shows this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from cad.checks import check, positive, seed, steps, text, whole
from cad.concepts import of_prompt
from cad.errors import UserError
from cad.identity import describe_runtime, immaterial
from cad.models.base import DiffusionModel, checkpointed_gradients
from cad.models.conditioning import FIRST, TokenSpace
from cad.noised import Pictures
from cad.references import GeneratedImages
from cad.sampling import make_generators
from cad.store import Notes, Store, read_tensors, write_tensors
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import Victims
from evaluation.attacks.probe import Probe
from evaluation.attacks.search import prediction_errors, rounded
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import to_pixels

FORMAT = "cad-token/1"


@dataclass(frozen=True, kw_only=True)
class LearnedToken(Probe):
    """UserError for values out of range."""

    name: ClassVar[str] = "learned_token"

    prompt: str  # the concept's, whose pictures it learns from
    pictures: GeneratedImages
    initial: str  # the words whose tokens' mean v is at first
    lr: float  # Adam's
    steps: int  # levels of noise
    states: int  # noised pictures in an optimiser step
    seed: int = 0
    store: str = immaterial()  # folder of learned embeddings

    def __post_init__(self) -> None:
        super().__post_init__()
        place = f"attacks.{self.name}"
        check(self, place, prompt=text, initial=text, lr=positive)
        check(self, place, iterations=whole(1), steps=steps, states=whole(1), seed=seed)

    @property
    def subject(self) -> str:
        """The prompt that the pictures are of."""
        return self.prompt if self.other is None else self.other

    @property
    def uses_images(self) -> bool:
        return False

    def settings(self) -> dict[str, Any]:
        drawn = self.pictures.settings(of_prompt(self.subject))
        return super().settings() | {"pictures": dict(drawn)}

    def check(self, model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
        super().check(model, prompts)
        model.token_space()  # refuses models
        model.check_prompts([self.subject, self.initial])
        groups = dict.fromkeys(prompt.group for prompt in prompts)
        if len(groups) > 1:
            raise UserError(
                f"attack={self.name} learns the token of one concept, and the attacked prompts are "
                f"of {', '.join(groups)}: name one concept."
            )

    @torch.no_grad()
    def drawn(self, model: DiffusionModel, edit: WeightEdit, victims: Victims) -> Pixels:
        space = model.token_space()
        ids = space.prepend([""], 1).to(model.device)  # (1, L): start, one token, end
        learned = self._learned(model, edit, space, ids).to(model.device)  # (1, 1, D)
        rows = range(len(victims.prompts))
        with edit.applied(model):
            c = space.encode(ids, learned, FIRST).expand(len(rows))
            return to_pixels(model.decode_latents(victims.sampled(model, c, rows)))[0]

    def _learned(
        self, model: DiffusionModel, edit: WeightEdit, space: TokenSpace, ids: Tensor
    ) -> Tensor:
        """The embedding (1, 1, D), from the store or learned and kept there."""
        key = {"model": model.provenance(), "edit": edit.fingerprint, **self.settings()}
        found, _ = Store(self.store).get_or_make(
            key | describe_runtime(model.device),
            f"the {self.name}",
            _read,
            lambda: self.learn(model, edit, space, ids),
            _write,
        )
        return found[0]

    def learn(
        self, model: DiffusionModel, edit: WeightEdit, space: TokenSpace, ids: Tensor
    ) -> tuple[Tensor, list[float | None]]:
        """The embedding v (1, 1, D), float32, and the mean loss of each step."""
        pictures = Pictures.draw(model, [self.subject], self.pictures)
        words = space.ids([self.initial])[0, FIRST : model.last_tokens([self.initial])[0] + 1]
        v = space.vocabulary[words.to(model.device)].float().mean(dim=0).reshape(1, 1, -1)
        v.requires_grad_()
        adam, losses = torch.optim.Adam([v], lr=self.lr), list[float | None]()
        wanted = self.gradient_checkpointing
        with edit.applied(model), checkpointed_gradients(model.denoiser, wanted):
            for i in tqdm(range(self.iterations), self.name, unit="step", disable=None):
                salt = f"learned-token-{self.seed}-{i}"
                at = pictures.noised(model, self.steps, make_generators(range(self.states), salt))
                n = len(at.t)
                with torch.enable_grad():
                    given = ids.expand(n, -1), v.detach().repeat(n, 1, 1)
                    errors, gradient = prediction_errors(
                        model, space, *given, at.x_t, at.t, at.target
                    )
                v.grad = gradient.mean(dim=0, keepdim=True)
                adam.step()
                losses.append(rounded(errors.mean()))
        return v.detach(), losses


def _write(path: Path, learned: tuple[Tensor, list[float | None]]) -> Notes:
    write_tensors(path, {"embedding": learned[0]}, {"losses": learned[1]}, FORMAT)
    return {}


def _read(path: Path, _notes: Notes) -> tuple[Tensor, list[float | None]]:
    header, tensors = read_tensors(path, FORMAT)
    return tensors["embedding"], header["losses"]
