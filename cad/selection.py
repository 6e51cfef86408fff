"""Which components an edit changes (paper Algorithms 1 and 2).

Per row, the published setting: a row is one output neuron (of a convolution, one output channel);
of its k = floor(ratio * in_features) largest scores those are chosen that are strictly positive.
With ratio 0.001 a row of 320 loses nothing and a row of 1280 at most one. Per layer, k counts the
whole weight and the rows compete; per model, all weights of the group compete for one k. Units
larger than a weight (`cad.units`) compete per layer or per model by the sums of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from cad.checks import one_of, ratio
from cad.errors import UserError
from cad.identity import Identified
from cad.units import UNITS, Units, unit_counts, unit_indices, unit_sums

PER = ("row", "layer", "model")


@dataclass(frozen=True)
class Selection(Identified):
    """The share of components to choose. UserError for a ratio outside (0, 1] or unknown names."""

    ratio: float  # of each row or layer, or of the whole group
    per: str = "row"  # "row" | "layer" | "model"
    unit: str = "weight"  # what is chosen: "weight" | "neuron" | "head" | "matrix"

    def __post_init__(self) -> None:
        ratio("ratio.value", self.ratio)
        one_of(PER)("ratio.per", self.per)
        one_of(UNITS)("ratio.unit", self.unit)
        if self.unit != "weight" and self.per == "row":
            raise UserError(
                f"ratio.per=row ranks single weights, and ratio.unit={self.unit}: a row is itself "
                "one or less. Use ratio.per=layer or ratio.per=model."
            )

    def budget(self, width: int) -> int:
        """k = floor(ratio * width), with the ratio as it is written."""
        return floor_share(self.ratio, width)

    def check(self, weights: Mapping[str, Tensor], units: Units | None = None) -> None:
        """UserError if the ratio is so small that no component of these weights can be chosen."""
        if units is None:
            sizes = [self._rankings(weight.flatten(1)).shape[1] for weight in weights.values()]
        else:
            sizes = list(unit_counts(units).values())
        widest = sum(sizes) if self.per == "model" else max(sizes)
        if self.budget(widest) == 0:
            raise UserError(
                f"ratio.value={self.ratio} chooses nothing: a {self.per} has at most {widest} "
                f"{'components' if units is None else self.unit}, so the ratio must be at least "
                f"{1 / widest:.3g}" + (" (or use ratio.per=layer)." if self.per == "row" else ".")
            )

    def indices(
        self, scores: Mapping[str, Tensor], sign: int = 1, units: Units | None = None
    ) -> dict[str, Tensor]:
        """Flat indices (k,) int64, ascending, into each weight; weights without any are left out.

        scores {name: (out, in)}; sign +1 chooses the most positive, -1 the most negative. With
        `units` (`cad.units.find_units`) all weights of the chosen units.
        """
        if units is not None:
            chosen = self.indices(unit_sums(scores, units), sign)
            return unit_indices(chosen, units, scores)
        if self.per == "model":
            budget = self.budget(sum(score.numel() for score in scores.values()))
            found = top_of_all({name: sign * score for name, score in scores.items()}, budget)
        else:
            found = {}
            for name, score in scores.items():
                rankings = self._rankings(sign * score)
                found[name] = top_positive(rankings, self.budget(rankings.shape[1]))
        return {name: indices for name, indices in found.items() if indices.numel()}

    def _rankings(self, score: Tensor) -> Tensor:
        """Rows whose scores compete for one budget: (out, in), or (1, out * in)."""
        return score if self.per == "row" else score.reshape(1, -1)


def floor_share(share: float, total: int) -> int:
    """floor(share * total), with the share as it is written: 0.29 of 100 is 29."""
    return math.floor(Fraction(repr(float(share))) * total)


def top_positive(scores: Tensor, k: int) -> Tensor:
    """Flat indices of the k largest entries of each row, if they are strictly positive.

    scores (rows, columns) -> (at most rows * k,) int64, ascending.
    """
    values, columns = scores.topk(k, dim=1)  # (rows, k)
    starts = torch.arange(scores.shape[0], device=scores.device)[:, None] * scores.shape[1]
    return (starts + columns)[values > 0].sort().values


def top_of_all(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Flat indices, ascending, of the k largest entries of all tensors that are strictly positive.

    Each tensor's own k largest are ranked together, so a model's scores are never in one tensor.
    """
    places = {name: score.flatten().topk(min(k, score.numel())) for name, score in scores.items()}
    values = torch.cat([best.values for best in places.values()])
    keep = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    keep[values.topk(min(k, values.numel())).indices] = True
    keep &= values > 0
    counts = [best.indices.numel() for best in places.values()]
    return {
        name: best.indices[kept].sort().values
        for (name, best), kept in zip(places.items(), keep.split(counts), strict=True)
    }
