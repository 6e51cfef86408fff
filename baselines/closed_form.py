"""The linear algebra of UCE, RECE and SPEED over the key and value projections of cross-attention.

Notation: a text's states are rows (n, D), one for each token position; a projection is a weight
(out, D) whose output for a state c is W c. Systems are built and solved in float64: with a small
lambda their condition number exceeds what float32 carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cad.components import text_projections
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.weight_edit import Replace, WeightEdit

POSITIONS = ("last", "from_last")  # of a text's tokens that are erased
_TEXTS = 64  # encoded at once
_ROWS = 4096  # states whose outer products are summed at once


History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Text:
    """A text as the denoiser reads it: `states` (L, D) float32, and where its last token is."""

    states: Tensor
    last: int


def shared_update(
    erased: Tensor,
    guides: Tensor,
    kept: Tensor,
    erase_scale: float,
    preserve_scale: float,
    regularisation: float,
) -> Tensor:
    """M (D, D) float64 of UCE's update W + W M; the same M for every projection W.

    V = W + W M minimises s_e sum_i ||V c_i - W g_i||^2 + s_p sum_j ||V k_j - W k_j||^2 + lambda
    ||V - W||_F^2 (Gandikota et al. 2024, Eq. 7), with c_i the rows of `erased` (n, D), g_i those of
    `guides` (n, D), k_j those of `kept` (m, D). Its normal equations are V A = B, with A = s_e sum
    c c^T + s_p sum k k^T + lambda I. Less W A they are (V - W) A = W s_e sum (g - c) c^T: W stands
    in front of all of the right side, and what is not erased cancels exactly.
    """
    c, g = erased.double(), guides.double()  # (n, D)
    identity = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    system = erase_scale * _moment(c) + preserve_scale * _moment(kept) + regularisation * identity
    factor = torch.linalg.cholesky(system)  # (D, D); lambda > 0 makes it positive definite
    gain = torch.cholesky_solve(erase_scale * c.T, factor)  # (D, n): A^-1 s_e c
    return (g - c).T @ gain.T  # (D, D)


def updated(weights: Mapping[str, Tensor], update: Tensor) -> dict[str, Tensor]:
    """W + W M of every weight (out, D), in float32. Where M is zero, a copy of W, bit for bit."""
    matrix = update.float()  # (D, D)
    if not matrix.any():
        return {name: weight.float().clone() for name, weight in weights.items()}
    return {name: torch.addmm(w.float(), w.float(), matrix) for name, w in weights.items()}


def adversarial_map(
    current: Iterable[Tensor], original: Iterable[Tensor], regularisation: float
) -> Tensor:
    """K (D, D) float64 with c' = K c: the embedding that brings a concept back (RECE, Eq. 8).

    c' minimises sum_l ||W_l c' - W_l^orig c||^2 + lambda ||c'||^2 over the pairs of a weight
    W_l (out, D) now and W_l^orig as it was: K = (lambda I + sum W_l^T W_l)^-1 sum W_l^T W_l^orig.
    """
    system = crossed = torch.zeros(())  # (D, D) both
    for now, was in zip(current, original, strict=True):
        w = now.double()  # (out, D)
        system, crossed = system + w.T @ w, crossed + w.T @ was.double()
    identity = torch.eye(len(system), dtype=system.dtype, device=system.device)
    factor = torch.linalg.cholesky(system + regularisation * identity)
    return torch.cholesky_solve(crossed, factor)


def squared_distance(
    first: Iterable[Tensor], a: Tensor, second: Iterable[Tensor], b: Tensor
) -> float:
    """sum_l ||V_l a - W_l b||^2 over pairs of projections, summed over the rows of a, b (n, D)."""
    return sum(
        (a.double() @ v.double().T - b.double() @ w.double().T).square().sum().item()
        for v, w in zip(first, second, strict=True)
    )


def encode(model: DiffusionModel, texts: Sequence[str]) -> dict[str, Text]:
    """Each text's states and last token. UserError for a text that is too long, before any work."""
    unique = list(dict.fromkeys(texts))
    last = model.last_tokens(unique)
    states: list[Tensor] = []  # (L, D) each
    for start in range(0, len(unique), _TEXTS):
        encoded = model.encode_prompts(unique[start : start + _TEXTS])
        states += encoded.tensors["states"].float()
    return dict(zip(unique, map(Text, states, last), strict=True))


def aligned(concept: Text, guide: Text, positions: str) -> tuple[Tensor, Tensor]:
    """The concept's states to erase and the guide's for each of them, (n, D) both.

    "last": the last tokens alone. "from_last": all positions from the last tokens on, which after
    them are the end and the padding, as many as the shorter of the two has.
    """
    c, g = concept.states[concept.last :], guide.states[guide.last :]
    n = 1 if positions == "last" else min(len(c), len(g))
    return c[:n], g[:n]


def to_keep(text: Text, positions: str) -> Tensor:
    """A kept text's states (n, D): "last" its last token, "from_last" the whole text, as released.

    The whole text has the start token, whose state every prompt shares.
    """
    return text.states[text.last :][:1] if positions == "last" else text.states


def edited_projections(
    model: DiffusionModel,
    edit: Callable[[Mapping[str, Tensor]], tuple[Mapping[str, Tensor], History]],
) -> WeightEdit:
    """Replaces the key and value projections (out, D) of cross-attention by what `edit` makes.

    `edit` returns them with its history, and must not write to those it is given, which are the
    model's own. Raises UserError for a model without cross-attention.
    """
    original = {name: weight.detach() for name, weight in text_projections(model).items()}
    with measure(model.device) as meter, torch.no_grad():
        edited, history = edit(original)
        changes = {name: Replace(w.to(original[name].dtype)) for name, w in edited.items()}
    return WeightEdit(changes, cost=meter.cost, history=tuple(history))


def _moment(states: Tensor) -> Tensor:
    """sum c c^T over the rows of (n, D): (D, D) float64; a part at a time, as n can be 100,000s."""
    total = torch.zeros(states.shape[1], states.shape[1], dtype=torch.float64, device=states.device)
    for rows in states.split(_ROWS):
        total += rows.double().T @ rows.double()
    return total
