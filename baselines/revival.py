"""Zeroed weights brought back without data, and a defence (Zhang et al. 2026, arXiv 2603.06640).

Where an edit has zeroed weights, the zeros themselves say where the concept was. `Revived` reads
nothing but the edited matrices. In each, W (out, in), with zeros at M:

1. soft-impute: X <- W outside M, S_tau(X) at M, until X stays; S_tau takes tau off all singular
   values, tau being one of them, and X starts from the means of the columns;
2. of the values at M the largest share `keep` stays, the others are zero;
3. each that stays becomes sign(x) times the largest |w| that its row has outside M.

With `signs="random"` the same places get the same magnitudes with signs that were tossed: what that
control brings back too, any large weights there bring back. `Refilled` is the defence: noise of
its row's deviation in place of the zeros, which are then no longer to be found.

The magnitude is as released but for a draw of N(mean, deviation^2) of the row, which in the release
replaces the row's largest where it is still larger. An edit without zeros stays as it is.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from baselines.afterwards import Afterwards, edited_weights
from cad.checks import check, not_negative, one_of, positive, ratio, seed, share, whole
from cad.concepts import Concept
from cad.models.base import DiffusionModel
from cad.sampling import make_generators
from cad.selection import floor_share
from cad.weight_edit import Change, Replace, WeightEdit

log = logging.getLogger(__name__)

MAGNITUDES = ("row_max", "completed")
SIGNS = ("completed", "random")


class _AtZeros(Afterwards):
    """Gives the zeros of every edited matrix other values."""

    seed: int

    @abstractmethod
    def filled(self, matrix: Tensor, zeros: Tensor, generator: Generator) -> Tensor:
        """The matrix (out, in) float32 with other values where `zeros` (out, in) has True."""

    @torch.no_grad()
    def alter(
        self, model: DiffusionModel, concepts: Sequence[Concept], edit: WeightEdit
    ) -> WeightEdit:
        changes: dict[str, Change] = {}
        for name, weight in edited_weights(model, edit).items():
            zeros = weight.flatten(1) == 0 if weight.dim() > 1 else torch.zeros(())
            if zeros.any() and not zeros.all():
                (generator,) = make_generators([self.seed], salt=f"{self.step}-{name}")
                filled = self.filled(weight.flatten(1).float(), zeros, generator)
                changes[name] = Replace(filled.view_as(weight).to(weight.dtype))
        if not changes:
            log.warning("after=%s: edit=%s leaves no zeros, and stays", self.step, self.inner.name)
        return WeightEdit({**edit.changes, **changes})


@dataclass(frozen=True, eq=False, kw_only=True)
class Revived(_AtZeros):
    """The attack: a low-rank completion of the zeros. UserError for a value that is not allowed."""

    step: ClassVar[str] = "revived"

    iterations: int = 500  # of soft-impute, at most
    tolerance: float = 1e-5  # relative change of the matrix at which it ends
    shrinkage: float = 0.0  # tau: the singular value that this share is below; 0: the smallest
    keep: float = 0.6  # share of a matrix's completed values, the largest
    magnitude: str = "row_max"  # "row_max" | "completed": as soft-impute has them
    signs: str = "completed"  # "completed" | "random": the control
    seed: int = 0  # of random signs

    def __post_init__(self) -> None:
        super().__post_init__()
        place = "after.revived"
        check(self, place, iterations=whole(1), tolerance=not_negative, keep=ratio, seed=seed)
        check(self, place, shrinkage=share, magnitude=one_of(MAGNITUDES), signs=one_of(SIGNS))

    def filled(self, matrix: Tensor, zeros: Tensor, generator: Generator) -> Tensor:
        settings = self.shrinkage, self.iterations, self.tolerance
        found = soft_impute(matrix, zeros, *settings)[zeros]  # (k,)
        size = found.abs()
        if self.signs == "random":
            tossed = torch.randint(2, found.shape, generator=generator).to(found.device)
            found = size * (2 * tossed - 1)
        if self.magnitude == "row_max":
            most = matrix.abs().amax(dim=1, keepdim=True).expand_as(matrix)[zeros]  # (k,)
            found = found.sign() * most
        kept = size.topk(max(1, floor_share(self.keep, len(size)))).indices
        values = torch.zeros_like(found).index_copy(0, kept, found[kept])
        return matrix.masked_scatter(zeros, values)


@dataclass(frozen=True, eq=False, kw_only=True)
class Refilled(_AtZeros):
    """The defence: noise N(0, (scale sigma)^2), sigma the deviation of its row's other weights."""

    step: ClassVar[str] = "refilled"

    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "after.refilled", scale=positive, seed=seed)

    def filled(self, matrix: Tensor, zeros: Tensor, generator: Generator) -> Tensor:
        count = (~zeros).sum(dim=1, keepdim=True).clamp(min=1)  # (out, 1)
        mean = matrix.sum(dim=1, keepdim=True) / count
        squares = (matrix - mean).masked_fill(zeros, 0.0).square().sum(dim=1, keepdim=True)
        sigma = (squares / count).sqrt()  # (out, 1)
        # A row without other weights takes the matrix's deviation: zeros would give it away.
        sigma = torch.where(sigma > 0, sigma, matrix[~zeros].std(correction=0))
        noise = torch.randn(matrix.shape, generator=generator).to(matrix.device)
        return torch.where(zeros, self.scale * sigma * noise, matrix)


def soft_impute(
    matrix: Tensor, missing: Tensor, shrinkage: float, iterations: int, tolerance: float
) -> Tensor:
    """Step 1 of the module's head: the matrix (out, in) with its missing entries completed."""
    count = (~missing).sum(dim=0).clamp(min=1)  # (in,)
    filled = torch.where(missing, matrix.masked_fill(missing, 0.0).sum(dim=0) / count, matrix)
    for _ in range(iterations):
        u, values, v = torch.linalg.svd(filled, full_matrices=False)
        tau = values[-1 - floor_share(shrinkage, len(values) - 1)]
        low_rank = (u * (values - tau).clamp(min=0)) @ v
        after = torch.where(missing, low_rank, matrix)
        change = (after - filled).norm() / filled.norm()
        filled = after
        if change <= tolerance:
            break
    return filled
