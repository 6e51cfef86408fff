"""Components larger than a weight: neurons, attention heads, whole matrices.

Eq. 3 is first-order, so zeroing several weights is predicted to cost the sum of their scores: a
unit's score is the sum of its weights'. (The paper looks at single weights alone and leaves the
rest open, Appendix A.) A neuron is an output row of a weight matrix, of a convolution an output
channel. A head is its rows of the query, key and value projections together with its columns of the
output projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cad.errors import UserError
from cad.models.base import DiffusionModel

UNITS = ("weight", "neuron", "head", "matrix")
_PROJECTION = re.compile(
    r"^(?P<attention>.*)\.((add_[qkv]_proj|to_[qkv])|(?P<out>to_out\.0|to_add_out))\.weight$"
)


@dataclass(frozen=True)
class Blocks:
    """How a weight (out, in) falls into the units of its layer: `count` equal blocks along `dim`.

    Weights of one layer share its units.
    """

    layer: str
    count: int
    dim: int = 0  # 0: blocks of rows, 1: of columns


Units = Mapping[str, Blocks]
"""The blocks of each weight, by its name."""


def find_units(model: DiffusionModel, weights: Mapping[str, Tensor], unit: str) -> Units | None:
    """The units of a group's weights; None where each weight is its own.

    Raises UserError for heads of weights that belong to no attention.
    """
    if unit == "weight":
        return None
    if unit == "head":
        return {name: _heads(model, name) for name in weights}
    return {
        name: Blocks(name, 1 if unit == "matrix" else len(weight))
        for name, weight in weights.items()
    }


def unit_counts(units: Units) -> dict[str, int]:
    """How many units each layer has."""
    return {blocks.layer: blocks.count for blocks in units.values()}


def unit_sums(scores: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
    """The sums of each unit's scores, {layer: (1, units) float64}, from {name: (out, in)}."""
    sums: dict[str, Tensor] = {}
    for name, score in scores.items():
        blocks = units[name]
        lines = score.sum(1 - blocks.dim, dtype=torch.float64)  # (out,) or (in,)
        found = lines.reshape(1, blocks.count, -1).sum(2)
        sums[blocks.layer] = sums[blocks.layer] + found if blocks.layer in sums else found
    return sums


def unit_indices(
    chosen: Mapping[str, Tensor], units: Units, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Flat indices (k,) int64, ascending, of all weights of the chosen units.

    chosen {layer: indices of its units}; weights without any are left out.
    """
    found = {}
    for name, score in scores.items():
        blocks = units[name]
        if blocks.layer not in chosen:
            continue
        lines = torch.zeros(blocks.count, dtype=torch.bool, device=score.device)
        lines[chosen[blocks.layer]] = True
        lines = lines.repeat_interleave(score.shape[blocks.dim] // blocks.count)  # (out,) or (in,)
        mask = lines.unsqueeze(1 - blocks.dim).expand_as(score)  # (out, in)
        found[name] = mask.flatten().nonzero().squeeze(1)
    return found


def _heads(model: DiffusionModel, name: str) -> Blocks:
    match = _PROJECTION.match(name)
    if match is None:
        raise UserError(
            f"ratio.unit=head is not allowed for {name}, which belongs to no attention: use "
            "component=attn1, component=attn2, or ratio.unit=neuron."
        )
    heads = int(model.denoiser.get_submodule(match["attention"]).heads)  # type: ignore[arg-type]
    return Blocks(match["attention"], heads, dim=0 if match["out"] is None else 1)
