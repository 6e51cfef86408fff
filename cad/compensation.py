"""Compensation of an ablation, in closed form (after optimal brain surgeon, Hassibi & Stork 1993).

A row w loses the weights M: it becomes w_0, w with zeros at M. Its other weights are then moved so
that the layer's outputs come back on what is preserved and stay lost on what is erased: of all rows
w' with w'_M = 0 that one is taken which minimises

    sum over x_k of (w' x_k - w x_k)^2 + s sum over x_c of (w' x_c - w_0 x_c)^2 + rho ||w' - w_0||^2

with x_k, x_c the layer's inputs on trajectories of the preserved and of the edited prompts, each a
mean over prompts. With H_k = sum x_k x_k^T, G = H_k + s H_c + rho I, r = (w - w_0) H_k, u = r G^-1:

    w' = w_0 + u - u_M ([G^-1]_MM)^-1 [G^-1]_M.

G is the same for all rows, so a layer takes one Cholesky factorisation, and a row one solve of M's
size. Without the second sum (s = 0) it is optimal brain surgeon's update of all of M at once, which
brings back what the preserved prompts share with the edited one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cad.attribution import Attribution, overflow
from cad.checks import check, not_negative, positive, whole
from cad.errors import UserError
from cad.identity import Identified
from cad.models.base import DiffusionModel
from cad.trajectories import ALL, visits
from cad.weight_edit import Change, Replace

_ELEMENTS = 2**24  # of the rows' systems that are solved at once


@dataclass(frozen=True, kw_only=True)
class Compensation(Identified):
    """Moves the weights that are left. UserError for a value that is not allowed."""

    samples: int = 0  # trajectories of each prompt, otherwise as the attribution's; 0: none is made
    erase_scale: float = 1.0  # s, the weight of what is to stay lost
    damping: float = 0.01  # rho, as a share of the mean of H_k's diagonal (SparseGPT: 0.01)

    def __post_init__(self) -> None:
        check(self, "edit.compensation", samples=whole(0), erase_scale=not_negative)
        check(self, "edit.compensation", damping=positive)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """UserError if not all weights are those of linear layers."""
        other = [name for name, weight in weights.items() if weight.dim() != 2]
        if other:
            raise UserError(
                f"edit.compensation.samples={self.samples} is for linear layers alone, and the "
                f"chosen component has {other[0]}, a convolution: use component=ff, or "
                "edit.compensation.samples=0."
            )

    @torch.no_grad()
    def changes(
        self,
        model: DiffusionModel,
        chosen: Mapping[str, Tensor],
        preserved: Sequence[str],
        edited: Sequence[str],
        plan: Attribution,
    ) -> dict[str, Change]:
        """The weights without those at flat indices `chosen`, the others moved; {name: (out, in)}.

        preserved, edited: prompts. Needs two (in, in) float32 for each layer. Raises UserError for
        inputs that are not finite.
        """
        plan = replace(plan, samples=self.samples, stage=ALL)
        kept, lost = (
            input_moments(model, list(chosen), each, plan) for each in (preserved, edited)
        )
        weights = dict(model.denoiser.named_parameters())
        changes: dict[str, Change] = {}
        for name, h_k in kept.items():
            h_c = self.erase_scale * lost[name]
            if not (h_k + h_c).isfinite().all():
                raise overflow(model, f"the inputs of {name} are not finite")
            weight = weights[name]
            removed = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            removed[chosen[name].to(weight.device)] = True
            moved = compensated(weight, removed.view_as(weight), h_k, h_c, self.damping)
            changes[name] = Replace(moved.to(weight.dtype))
        return changes


def input_moments(
    model: DiffusionModel, names: Sequence[str], prompts: Sequence[str], plan: Attribution
) -> dict[str, Tensor]:
    """x x^T over the inputs x of linear layers, {name of a weight: (in, in) float32}.

    Of the predictions with the prompt at the x_t of its trajectories: a sum, mean over prompts.
    """
    weights = dict(model.denoiser.named_parameters())
    moments = {
        name: torch.zeros(2 * weights[name].shape[1:], dtype=torch.float32, device=model.device)
        for name in names
    }
    empty = model.encode_prompts([""])
    for prompt in tqdm(prompts, "inputs of layers", unit="prompt", disable=None):
        c = model.encode_prompts([prompt])
        for visit in visits(model, plan, c, empty):
            with _recorded(model.denoiser, moments):
                model.predict(visit.x_t, visit.t, c.expand(len(visit.x_t)))
    return {name: moment / len(prompts) for name, moment in moments.items()}


def compensated(
    weight: Tensor, removed: Tensor, h_k: Tensor, h_c: Tensor, damping: float
) -> Tensor:
    """w' of the module's head for every row: (out, in) float64, exactly 0 where `removed`.

    weight (out, in), removed (out, in) bool; H_k and s H_c (in, in).
    """
    w, h = weight.double(), h_k.double()
    rho = damping * h.diagonal().mean()
    system = h + h_c.double() + rho * torch.eye(len(h), dtype=h.dtype, device=h.device)  # G
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))  # (in, in)
    free = w.masked_fill(~removed, 0.0) @ h @ inverse  # (out, in): u
    multipliers = torch.zeros_like(w)  # (out, in): u_M ([G^-1]_MM)^-1 at M, else 0
    counts = removed.sum(dim=1)  # (out,)
    for count in counts[counts > 0].unique().tolist():  # rows with as many systems at once
        rows = (counts == count).nonzero().squeeze(1)
        for part in rows.split(max(1, _ELEMENTS // count**2)):
            at = removed[part].nonzero()[:, 1].view(-1, count)  # (rows, count): M
            block = inverse[at[:, :, None], at[:, None, :]]  # (rows, count, count)
            lost = free[part].gather(1, at).unsqueeze(2)  # (rows, count, 1)
            found = torch.linalg.solve(block, lost).squeeze(2)
            multipliers[part] = multipliers[part].scatter(1, at, found)
    return (w + free - multipliers @ inverse).masked_fill(removed, 0.0)


@contextmanager
def _recorded(denoiser: nn.Module, moments: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, every forward adds its layers' x x^T; the hooks are gone afterwards."""

    def add(moment: Tensor, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)  # (tokens, in)
        moment.addmm_(x.T, x)

    with ExitStack() as stack:
        for name, moment in moments.items():
            layer = denoiser.get_submodule(name.removesuffix(".weight"))
            stack.callback(layer.register_forward_pre_hook(partial(add, moment)).remove)
        yield
