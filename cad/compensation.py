"""Compensation of an ablation, in closed form (optimal brain surgeon, Hassibi & Stork 1993).

With the set M of a row's weights fixed at zero, the row's other weights are moved so that the
layer's outputs stay as they are on the prompts to preserve: of all rows w' with w'_M = 0,

    w' = argmin sum over x of (w' x - w x)^2 + rho ||w' - w||^2 = w - w_M ([H^-1]_MM)^-1 [H^-1]_M,

with x the layer's inputs on these prompts' trajectories and H = sum x x^T + rho I. H is the same
for all rows, so a layer takes one Cholesky factorisation, and a row one solve of M's size (as
Frantar & Alistarh 2022, Eq. 3, for one weight after another; here all of M at once).
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
from cad.checks import check, positive, whole
from cad.errors import UserError
from cad.identity import Identified
from cad.models.base import DiffusionModel
from cad.trajectories import visits
from cad.weight_edit import Change, Replace

_ELEMENTS = 2**24  # of the rows' systems that are solved at once


@dataclass(frozen=True, kw_only=True)
class Compensation(Identified):
    """Moves the weights that are left. UserError for a value that is not allowed."""

    samples: int = 0  # trajectories of each prompt, otherwise as the attribution's; 0: none is made
    damping: float = 0.01  # rho, as a share of the mean of H's diagonal (SparseGPT: 0.01)

    def __post_init__(self) -> None:
        check(self, "edit.compensation", samples=whole(0), damping=positive)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """UserError if not all weights are those of linear layers."""
        other = [name for name, weight in weights.items() if weight.dim() != 2]
        if other:
            raise UserError(
                f"edit.compensation is of linear layers alone, and {other[0]} is a convolution: "
                "use another component, or edit.compensation.samples=0."
            )

    @torch.no_grad()
    def changes(
        self,
        model: DiffusionModel,
        chosen: Mapping[str, Tensor],
        prompts: Sequence[str],
        plan: Attribution,
    ) -> dict[str, Change]:
        """The weights without those at flat indices `chosen`, the others moved; {name: (out, in)}.

        Needs an (in, in) float32 for each layer. Raises UserError for inputs that are not finite.
        """
        plan = replace(plan, samples=self.samples)
        weights = dict(model.denoiser.named_parameters())
        changes: dict[str, Change] = {}
        for name, moment in input_moments(model, list(chosen), prompts, plan).items():
            if not moment.isfinite().all():
                raise overflow(model, f"the inputs of {name} are not finite")
            weight = weights[name]
            removed = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            removed[chosen[name].to(weight.device)] = True
            moved = compensated(weight, removed.view_as(weight), moment, self.damping)
            changes[name] = Replace(moved.to(weight.dtype))
        return changes


def input_moments(
    model: DiffusionModel, names: Sequence[str], prompts: Sequence[str], plan: Attribution
) -> dict[str, Tensor]:
    """sum x x^T over the inputs x of linear layers on the prompts' trajectories, (in, in) float32.

    Of both predictions that guide an image, with the prompt and without. {name of a weight: ...}.
    """
    weights = dict(model.denoiser.named_parameters())
    moments = {
        name: torch.zeros(2 * weights[name].shape[1:], dtype=torch.float32, device=model.device)
        for name in names
    }
    empty = model.encode_prompts([""])
    with _recorded(model.denoiser, moments):
        for prompt in tqdm(prompts, "inputs of layers", unit="prompt", disable=None):
            for _ in visits(model, plan, model.encode_prompts([prompt]), empty):
                pass
    return moments


def compensated(weight: Tensor, removed: Tensor, moment: Tensor, damping: float) -> Tensor:
    """w' of the module's head for every row: (out, in) float64, exactly 0 where `removed`.

    weight (out, in), removed (out, in) bool, moment sum x x^T (in, in).
    """
    w, h = weight.double(), moment.double()
    rho = damping * h.diagonal().mean()
    h = h + rho * torch.eye(len(h), dtype=h.dtype, device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))  # (in, in)
    multipliers = torch.zeros_like(w)  # (out, in): w_M ([H^-1]_MM)^-1 at M, else 0
    counts = removed.sum(dim=1)  # (out,)
    for count in counts[counts > 0].unique().tolist():  # rows with as many systems at once
        rows = (counts == count).nonzero().squeeze(1)
        for part in rows.split(max(1, _ELEMENTS // count**2)):
            at = removed[part].nonzero()[:, 1].view(-1, count)  # (rows, count): M
            block = inverse[at[:, :, None], at[:, None, :]]  # (rows, count, count)
            lost = w[part].gather(1, at).unsqueeze(2)  # (rows, count, 1)
            found = torch.linalg.solve(block, lost).squeeze(2)
            multipliers[part] = multipliers[part].scatter(1, at, found)
    return (w - multipliers @ inverse).masked_fill(removed, 0.0)


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
