"""SPEED (Li et al. 2025, arXiv 2503.07392): a linear solve in the null space of what is kept.

The value projections of cross-attention read the concept's last token c as a guide's g, and change
nothing that the kept tokens k and the empty text's e have a part in: Delta minimises

    mean of ||(W + Delta) c - W g||^2 + s ||Delta||^2,  Delta k = 0,  Delta e = 0,

the mean over concepts (several tokens of one are added up). With P the projector on those
eigenvectors of mean k k^T whose eigenvalue is below a threshold, with A = mean c c^T, B = mean
(g - c) c^T and S = P (A P + s I)^-1,

    Delta = W B (S - S E^T (E S E^T)^-1 E S).

Which k count, each layer says for itself. Filtering: those that an update without constraints, W B
(A + I)^-1, moves by more than the mean. Augmentation: of each of them copies that are moved by
normal noise along W's last right singular vector, which W hardly reads; again those that the update
moves by more than the mean. The rows of E are the start token and three k-means centres of the
empty text's other positions.

The closed form, the filter, the noise and the constraints are the paper's; tokens, eigenvalues and
centres as released. Ours: solves in float64, a pseudo-inverse for E's (the release inverts what is
singular where E lies among what is kept), k-means that starts from evenly spaced positions, and one
mean for all copies (the release: for those of 128 kept texts at a time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from baselines.closed_form import POSITIONS, aligned, edited_projections, encode, to_keep, updated
from baselines.uce import check_guide, to_preserve
from cad.checks import check, flag, one_of, positive, seed, text, texts, whole
from cad.concepts import Concept
from cad.edits import Edit
from cad.errors import UserError
from cad.identity import material
from cad.models.base import DiffusionModel
from cad.sampling import make_generators
from cad.weight_edit import WeightEdit

WEIGHTS = {"value": (".to_v.",), "key": (".to_k.",), "key_value": (".to_k.", ".to_v.")}
CENTRES = 3  # of the empty text's positions


@dataclass(frozen=True)
class SPEED(Edit):
    """Maps `concept.text` to the guide. UserError for a value that is not allowed."""

    name: ClassVar[str] = "speed"
    version: ClassVar[int] = 2

    guide: str  # read in place of the concept
    preserve: Sequence[str]  # texts to keep, but for those of the erased concepts
    weights: str = "value"  # projections that change, one of WEIGHTS
    threshold: float = 0.1  # of eigenvalues of mean k k^T: below it a direction is free
    regularisation: float = 1.0  # s
    filtered: bool = True  # keep the texts alone that an update without constraints would move
    augmentations: int = 10  # copies of each kept text; 0: none, and no filtering
    positions: str = "last"  # tokens that are erased and kept (`closed_form.aligned`)
    seed: int = 0  # of the copies

    def __post_init__(self) -> None:
        check(self, "edit", guide=text, preserve=texts, weights=one_of(WEIGHTS))
        check(self, "edit", threshold=positive, regularisation=positive, filtered=flag)
        check(self, "edit", augmentations=whole(0), positions=one_of(POSITIONS), seed=seed)

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        check_guide("edit", self.guide, concepts)
        kept = to_preserve(self.preserve, concepts)
        if not kept:
            raise UserError(f"edit.preserve={list(self.preserve)} keeps nothing: name texts.")
        return material(self) | {"preserve": kept}

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        self.settings(concepts)  # refuses texts
        return edited_projections(model, lambda w: (self.edited(model, w, concepts), ()))

    def edited(
        self, model: DiffusionModel, weights: Mapping[str, Tensor], concepts: Sequence[Concept]
    ) -> dict[str, Tensor]:
        """The changed projections (out, D), float32. UserError for texts that are too long."""
        kept = to_preserve(self.preserve, concepts)
        encoded = encode(model, [self.guide, "", *(each.text for each in concepts), *kept])
        guide, empty = encoded[self.guide], encoded[""].states
        pairs = [aligned(encoded[each.text], guide, self.positions) for each in concepts]
        a, b = moments([(c.double(), g.double()) for c, g in pairs])  # (D, D) both
        k = torch.cat([to_keep(encoded[each], self.positions) for each in kept]).double()  # (m, D)
        e = invariants(empty.double())  # (4, D)
        found: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if any(part in name for part in WEIGHTS[self.weights]):
                (generator,) = make_generators([self.seed], salt=f"{self.name}-{name}")
                refined = self._refined(weight.double(), a, b, k, generator)
                update = null_space_update(a, b, refined, e, self.threshold, self.regularisation)
                found |= updated({name: weight}, update)
        return found

    def _refined(
        self, weight: Tensor, a: Tensor, b: Tensor, k: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The states to keep for one projection (out, D): rows of k that count, and copies."""
        if not self.augmentations:
            return k
        identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
        erasing = weight @ torch.linalg.solve(a + identity, b, left=False)  # (out, D)
        if self.filtered:
            k = _most_moved(k, erasing)
        unread = torch.linalg.svd(weight, full_matrices=False).Vh[-1]  # (D,)
        noise = torch.randn(self.augmentations * len(k), 1, generator=generator, dtype=k.dtype)
        copies = k.repeat(self.augmentations, 1) + noise.to(k.device) * unread
        return torch.cat([k, _most_moved(copies, erasing)])


def moments(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A and B (D, D) of the module's head: pairs of a concept's states and its guide's (n, D)."""
    a = torch.stack([c.T @ c for c, _ in pairs]).mean(dim=0)
    return a, torch.stack([(g - c).T @ c for c, g in pairs]).mean(dim=0)


def null_space_update(
    a: Tensor, b: Tensor, k: Tensor, e: Tensor, threshold: float, near: float
) -> Tensor:
    """M (D, D) of the update W + W M, as the module's head has it; all float64.

    a and b (D, D) are `moments`, k (m, D) and e (4, D) the states to keep.
    """
    values, vectors = torch.linalg.eigh(k.T @ k / len(k))
    free = vectors[:, values < threshold]  # (D, f)
    p = free @ free.T
    identity = torch.eye(len(p), dtype=p.dtype, device=p.device)
    s = torch.linalg.solve(a @ p + near * identity, p, left=False)  # (D, D)
    within = e @ s @ e.T
    s = s - s @ e.T @ torch.linalg.pinv((within + within.T) / 2, hermitian=True) @ e @ s
    update: Tensor = b @ s
    return update


def invariants(empty: Tensor) -> Tensor:
    """E (1 + CENTRES, D): the start token's state and the centres of the other positions'."""
    others = empty[1:].cpu().numpy()
    starts = others[[int((i + 0.5) * len(others) / CENTRES) for i in range(CENTRES)]]
    centres, _ = kmeans2(others, starts, minit="matrix", missing="raise")
    return torch.cat([empty[:1], torch.from_numpy(centres).to(empty)])


def _most_moved(states: Tensor, update: Tensor) -> Tensor:
    """The rows (n, D) that an update (out, D) moves by no less than the mean."""
    moved = (states @ update.T).norm(dim=1)  # (n,)
    return states[moved >= moved.mean()]
