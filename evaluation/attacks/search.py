"""The schedule that all attacks share, for a batch of prompts.

At each timestep, `iterations` of the optimiser on the squared error of the edited model's
prediction (mean over latent elements); then the prompt with the tokens as they are now is sampled,
with its own seed and guidance, and judged. Success ends a prompt's attack: it leaves the batch.
Variables and moments go on from timestep to timestep.

The edit is on the model from the first iteration of a timestep until its try is judged; before
that, the unedited model says what is wanted there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cad.attribution import GRADIENT_RMS, backward_scale
from cad.errors import UserError
from cad.models.base import DiffusionModel, checkpointed_gradients
from cad.models.conditioning import FIRST, TokenSpace
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import OPTIMIZERS, Attack, Victims
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings, to_pixels

Judge = Callable[[Pixels, Sequence[Prompt]], list[bool]]
"""Which images, (N, H, W, 3) uint8 RGB, show what their prompts' groups name."""

VERSION = 2  # of the schedule: raise it when equal settings find something else


@dataclass(frozen=True, eq=False)
class Outcome:
    """The end of an attack on one prompt."""

    success: bool
    timesteps: int  # how many it went through, the successful one included
    timestep: int  # the last of them
    tokens: list[int]  # adversarial ids, as they were at the end
    text: str  # of the whole adversarial prompt
    retokenizes: bool  # whether the text gives these very ids
    losses: list[float | None]  # of every iteration; None where not finite
    image: Pixels = field(repr=False)  # (H, W, 3) RGB, sampled from the text, or the tokens


def search(
    model: DiffusionModel,
    edit: WeightEdit,
    attack: Attack,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    judge: Judge,
    progress: tqdm[Any],
    images: Pixels | None = None,
) -> list[Outcome]:
    """The outcome of each prompt, all of one size; `settings` have their guidance.

    `images`, (N, H, W, 3), are the unedited model's of the prompts, for an attack that uses them.
    Leaves model and random state as found. `progress` counts timesteps of prompts. Raises UserError
    for prompts without room for the tokens, or a GPU without memory for the batch.
    """
    try:
        with model.encoding():
            victims = Victims.of(model, prompts, settings, f"attack-{attack.name}", images)
            return _Search(model, edit, attack, victims).run(judge, progress)
    except torch.OutOfMemoryError as error:
        key = f"attacks.{attack.name}"
        raise UserError(
            f"the GPU's memory does not hold an attack on {len(prompts)} prompts at once: lower "
            f"{key}.batch_size, or set {key}.gradient_checkpointing=true"
        ) from error


def places(space: TokenSpace, prompts: Sequence[Prompt], count: int) -> Tensor:
    """(N, L) ids of the prompts with room for `count` tokens. UserError where one has none."""
    return torch.cat([space.prepend([p.text], count, truncate=p.truncate) for p in prompts])


class _Search:
    """One batch's search: its variables, and what became of each prompt so far."""

    def __init__(
        self, model: DiffusionModel, edit: WeightEdit, attack: Attack, victims: Victims
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
            losses, gradient = self._loss(embeddings.detach(), step, rows, x_t, target)
            embeddings.backward(gradient)
        self._optimiser.step()
        for row, loss in zip(rows, losses.tolist(), strict=True):
            self._attack.confine(self._variables[row])
            self._losses[row].append(float(f"{loss:.6g}") if math.isfinite(loss) else None)

    def _loss(
        self, embeddings: Tensor, step: int, rows: Sequence[int], x_t: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each prompt's squared error, (n,), and its gradient by its embeddings, (n, k, D).

        Each prompt's backward starts from a gradient of one size, so that none vanishes in half
        precision. Where the edited model gives no finite numbers, the gradient is 0.
        """
        leaf = embeddings.requires_grad_()
        conditioning = self._space.encode(self._ids[list(rows)], leaf, FIRST)
        phi = self._model.predict(x_t, self._visited[step], conditioning)
        error = phi.detach().float() - target.float()  # (n, C, h, w)
        losses = error.square().flatten(1).mean(dim=1)  # (n,)
        start = (2 * error / error[0].numel()).nan_to_num(0, 0, 0)  # the losses' derivative by phi
        powers = [backward_scale(each, GRADIENT_RMS) for each in start]
        scales = torch.tensor(powers, device=start.device).reshape(-1, 1, 1, 1)
        (gradient,) = torch.autograd.grad(phi, leaf, (scales * start).to(phi.dtype))
        return losses, (gradient / scales.squeeze(-1)).nan_to_num(0, 0, 0)

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
