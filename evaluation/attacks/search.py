"""Attacks by k tokens before a prompt, and the schedule that they share, for a batch of prompts.

At each timestep, `iterations` of the optimiser on the squared error of the edited model's
prediction (mean over latent elements); then the prompt with the tokens as they are now is sampled,
with its own seed and guidance, and judged. Success ends a prompt's attack: it leaves the batch.
Variables and moments go on from timestep to timestep.

The edit is on the model from the first iteration of a timestep until its try is judged; before
that, the unedited model says what is wanted there.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from cad.attribution import GRADIENT_RMS, backward_scale
from cad.checks import check, flag, not_negative, one_of, positive, steps, whole
from cad.models.base import DiffusionModel, checkpointed_gradients
from cad.models.conditioning import FIRST, TokenSpace
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import Attack, Judge, Outcome, Victims
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import to_pixels

MOST_TOKENS = 75  # CLIP's text encoders take 77, with start and end
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

Aim = Callable[[int, Sequence[int]], Sequence[tuple[Tensor, Tensor]]]
"""The predictions that an attack wants of the edited model, asked of the unedited one.

(step, rows) -> for each iteration at the timestep `step`, counted from 0: x_t as the network takes
it, and the wanted prediction there, both (n, C, h, w), for the victims `rows`. Asked once for each
timestep, without gradient. May draw from the victims' generators.
"""


@dataclass(frozen=True, kw_only=True)
class TokenAttack(Attack):
    """A way to look for adversarial tokens: how long and how fast, and by which variables.

    Variables are float32, one tensor for each prompt. Raises UserError for values out of range.
    """

    optimises: ClassVar[bool] = True  # False: no iterations, and no states to have them at

    tokens: int  # k, prepended to the prompt
    timesteps: int  # that it goes through, at each `iterations` steps and a try in the end
    optimizer: str  # "adam": weight decay is a part of the gradient (L2) | "adamw": decoupled
    lr: float
    weight_decay: float
    retokenize: bool  # the text of the tokens is tried, as the tokenizer reads it; False: their ids

    def __post_init__(self) -> None:
        super().__post_init__()
        place, iterations = f"attacks.{self.name}", whole(1 if self.optimises else 0)
        check(self, place, tokens=whole(1, MOST_TOKENS), timesteps=steps, iterations=iterations)
        check(self, place, optimizer=one_of(OPTIMIZERS), lr=positive, weight_decay=not_negative)
        check(self, place, retokenize=flag)

    @property
    def tries(self) -> int:
        return self.timesteps

    @property
    def uses_images(self) -> bool:
        return self.optimises

    def check(self, model: DiffusionModel, prompts: Sequence[Prompt]) -> None:
        super().check(model, prompts)
        places(model.token_space(), prompts, self.tokens)
        self.visited(model)

    def outcomes(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        victims: Victims,
        judge: Judge,
        progress: tqdm[Any],
    ) -> list[Outcome]:
        return _Search(model, edit, self, victims).run(judge, progress)

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


def places(space: TokenSpace, prompts: Sequence[Prompt], count: int) -> Tensor:
    """(N, L) ids of the prompts with room for `count` tokens. UserError where one has none."""
    return torch.cat([space.prepend([p.text], count, truncate=p.truncate) for p in prompts])


def prediction_errors(
    model: DiffusionModel,
    space: TokenSpace,
    ids: Tensor,
    embeddings: Tensor,
    x_t: Tensor,
    t: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """Squared errors of n predictions, (n,), and their gradient by the embeddings (n, k, D).

    Each embedding's backward starts from a gradient of one size, so that none vanishes in half
    precision. Where the model gives no finite numbers, the gradient is 0. Needs gradients enabled.
    """
    leaf = embeddings.requires_grad_()
    phi = model.predict(x_t, t, space.encode(ids, leaf, FIRST))
    error = phi.detach().float() - target.float()  # (n, C, h, w)
    losses = error.square().flatten(1).mean(dim=1)  # (n,)
    start = (2 * error / error[0].numel()).nan_to_num(0, 0, 0)  # the losses' derivative by phi
    powers = [backward_scale(each, GRADIENT_RMS) for each in start]
    scales = torch.tensor(powers, device=start.device).reshape(-1, 1, 1, 1)
    (gradient,) = torch.autograd.grad(phi, leaf, (scales * start).to(phi.dtype))
    return losses, (gradient / scales.squeeze(-1)).nan_to_num(0, 0, 0)


def rounded(loss: Tensor) -> float | None:
    """A loss as records have it, with six digits; None where it is not finite."""
    return float(f"{loss:.6g}") if math.isfinite(loss) else None


class _Search:
    """One batch's search: its variables, and what became of each prompt so far."""

    def __init__(
        self, model: DiffusionModel, edit: WeightEdit, attack: TokenAttack, victims: Victims
    ) -> None:
        self._model, self._edit, self._attack, self._victims = model, edit, attack, victims
        self._space = model.token_space()
        self._visited = attack.visited(model)  # (timesteps,)
        self._aim = attack.aim(model, victims)
        self._ids = places(self._space, victims.prompts, attack.tokens).to(model.device)  # (N, L)
        self._variables = [
            attack.start(self._space, generator).to(model.device).requires_grad_()
            for generator in victims.generators
        ]  # one (k, ...) for each prompt: a prompt that left has no gradient, and stays as it is
        self._optimiser = OPTIMIZERS[attack.optimizer](
            self._variables, lr=attack.lr, weight_decay=attack.weight_decay
        )
        self._losses: list[list[float | None]] = [[] for _ in victims.prompts]

    def run(self, judge: Judge, progress: tqdm[Any]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        rows, timesteps = list(range(len(self._victims.prompts))), len(self._visited)
        for step in range(timesteps):
            outcomes |= self._pass(step, rows, judge)
            left = [row for row in rows if not outcomes[row].success]
            progress.update(len(left) + (timesteps - step) * (len(rows) - len(left)))
            rows = left
            if not rows:
                break
            for row in rows:
                self._attack.renew(self._space, self._variables[row], self._victims.generators[row])
        return [outcomes[row] for row in sorted(outcomes)]

    def _pass(self, step: int, rows: Sequence[int], judge: Judge) -> dict[int, Outcome]:
        """The iterations at a timestep, and what became of the victims `rows` by its end."""
        with torch.no_grad():
            wanted = self._aim(step, rows)
        model, checkpointing = self._model, self._attack.gradient_checkpointing
        with self._edit.applied(model), checkpointed_gradients(model.denoiser, checkpointing):
            for x_t, target in wanted:
                self._iterate(step, rows, x_t, target)
            ids = self._adversarial(rows)  # (n, L)
            images = self._sample(ids, rows)
            shown = judge(images, [self._victims.prompts[row] for row in rows])
        return {
            row: self._outcome(shown[place], step, row, ids[place], images[place])
            for place, row in enumerate(rows)
        }

    def _iterate(self, step: int, rows: Sequence[int], x_t: Tensor, target: Tensor) -> None:
        self._optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            variables = torch.stack([self._variables[row] for row in rows])  # (n, k, ...)
            generators = [self._victims.generators[row] for row in rows]
            embeddings = self._attack.embed(self._space, variables, generators)  # (n, k, D)
            given = self._space, self._ids[list(rows)], embeddings.detach()
            at = x_t, self._visited[step], target
            losses, gradient = prediction_errors(self._model, *given, *at)
            embeddings.backward(gradient)
        self._optimiser.step()
        for row, loss in zip(rows, losses, strict=True):
            self._attack.confine(self._variables[row])
            self._losses[row].append(rounded(loss))

    @torch.no_grad()
    def _adversarial(self, rows: Sequence[int]) -> Tensor:
        """(n, L) ids of the prompts with the tokens as they are now."""
        ids = self._ids[list(rows)].clone()
        variables = torch.stack([self._variables[row] for row in rows])
        tokens = self._attack.discretise(self._space, variables)  # (n, k)
        ids[:, FIRST : FIRST + tokens.shape[1]] = tokens
        return ids

    @torch.no_grad()
    def _sample(self, ids: Tensor, rows: Sequence[int]) -> Pixels:
        """Images of the adversarial prompts, (n, H, W, 3) RGB; black where they are not finite."""
        if self._attack.retokenize:
            ids = self._space.reread(ids)
        x_0 = self._victims.sampled(self._model, self._space.encode_ids(ids), rows)
        return to_pixels(self._model.decode_latents(x_0))[0]

    def _outcome(self, success: bool, step: int, row: int, ids: Tensor, image: Pixels) -> Outcome:
        (text,) = self._space.decode(ids[None])
        return Outcome(
            success=success,
            timesteps=step + 1,
            timestep=int(self._visited[step]),
            tokens=ids[FIRST : FIRST + self._attack.tokens].tolist(),
            text=text,
            retokenizes=bool(torch.equal(self._space.ids([text])[0], ids.cpu())),
            losses=self._losses[row],
            image=image,
        )
