"""The nearest point of the probability simplex.

Held, Wolfe and Crowder, "Validation of subgradient optimization" (1974), as in Duchi et al. (2008),
Fig. 1: exact, by sorting. UnlearnDiff's own way, a bisection for the threshold, converges to it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_onto_simplex(points: Tensor) -> Tensor:
    """The Euclidean projection of (..., V) float points onto {p >= 0, sum p = 1}, row by row.

    It is max(point - theta, 0) with the one theta of each row that makes the sum 1.
    """
    shifted = points - points.amax(dim=-1, keepdim=True)  # (..., V); keeps small sums exact
    falling = shifted.sort(dim=-1, descending=True).values  # (..., V)
    excess = falling.cumsum(dim=-1) - 1  # (..., V), of the first j entries
    j = torch.arange(1, points.shape[-1] + 1, device=points.device)  # (V,)
    support = (falling * j > excess).sum(
        dim=-1, keepdim=True
    )  # (..., 1), entries that stay above 0
    theta = excess.gather(-1, support - 1) / support  # (..., 1)
    return (shifted - theta).clamp(min=0)
