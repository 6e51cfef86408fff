"""How far two sets of scores of the same weights agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

from cad.edits import ScoredEdit


@dataclass(frozen=True)
class Agreement:
    """Of two sets of scores."""

    rank_correlation: float  # Spearman's, over all scores
    mask_overlap: float  # share of the reference's mask that the other chooses too


def agree(
    reference: Mapping[str, Tensor], other: Mapping[str, Tensor], method: ScoredEdit
) -> Agreement:
    """How far `other` agrees with `reference`; scores {name: (out, in)} of the same weights."""
    flat = [torch.cat([each[name].flatten() for name in reference]) for each in (reference, other)]
    masks = [method.selection.indices(each, method.sign) for each in (reference, other)]
    chosen = sum(len(indices) for indices in masks[0].values())
    both = sum(
        int(torch.isin(indices, masks[1][name]).sum())
        for name, indices in masks[0].items()
        if name in masks[1]
    )
    return Agreement(float(spearmanr(*flat).statistic), both / chosen)
