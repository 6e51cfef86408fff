"""RECE (Gong et al. 2024, arXiv 2407.12383): UCE, then rounds of recovering and erasing.

Each round derives, in closed form, the embedding that the edited projections read most like the
concept was read before, and erases that too. As released, an update starts from the projections as
they are then: what they make of the guide is the target, and they are what the update stays near.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from baselines.closed_form import (
    History,
    Text,
    adversarial_map,
    aligned,
    edited_projections,
    encode,
    shared_update,
    squared_distance,
    updated,
)
from baselines.uce import UCE, check_guide
from cad.checks import check, flag, not_negative, positive, text, whole
from cad.concepts import Concept
from cad.edits import Edit
from cad.errors import UserError
from cad.identity import material
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit


class StartingUCE(UCE):
    """The UCE that RECE starts from: its settings stand below `edit.uce`."""

    place = "edit.uce"


@dataclass(frozen=True)
class RECE(Edit):
    """Starts from `uce`, then `epochs` rounds over all token positions of `concept.text`.

    The rounds' updates map the adversarial embeddings to `guide`, position by position, and keep
    it, once for each concept. The history has the residual by the number of rounds already made:
    `unreached`, the smallest over the concepts. UserError for a value that is not allowed.
    """

    name: ClassVar[str] = "rece"

    uce: UCE
    epochs: int
    # Lambda of the adversarial embedding (paper Eq. 8); the smaller, the larger an embedding is
    # still found and erased.
    regularisation: float
    update_regularisation: float = 0.1  # lambda of the rounds' updates
    preserve_scale: float = 0.1  # s_p of the rounds' updates
    guide: str = " "
    skip_if_erased: bool = False  # stop before a round with a larger residual than the threshold
    erased_threshold: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.uce, UCE):
            raise UserError(f"edit.uce={self.uce!r} is not allowed: it is the UCE to start from.")
        check(self, "edit", epochs=whole(0), guide=text, skip_if_erased=flag)
        check(self, "edit", regularisation=positive, update_regularisation=positive)
        check(self, "edit", preserve_scale=not_negative, erased_threshold=positive)

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        check_guide("edit", self.guide, concepts)
        return material(self) | {"uce": dict(self.uce.settings(concepts))}

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        self.settings(concepts)  # refuses guides
        return edited_projections(model, lambda w: self.edited(model, w, concepts))

    def edited(
        self, model: DiffusionModel, original: Mapping[str, Tensor], concepts: Sequence[Concept]
    ) -> tuple[dict[str, Tensor], History]:
        """The projections (out, D) after all rounds, float32, and a record for each round."""
        texts = encode(model, [self.guide, *(concept.text for concept in concepts)])
        guide = texts[self.guide]
        erased = [texts[concept.text] for concept in concepts]
        guides = guide.states.repeat(len(erased), 1)  # (n L, D)
        weights = self.uce.edited(model, original, concepts)
        history: list[dict[str, float]] = []
        for step in tqdm(range(self.epochs), desc=self.name, unit="round", disable=None):
            pairs = weights.values(), original.values()
            recover = adversarial_map(*pairs, self.regularisation)
            residual = min(unreached(*pairs, recover, each, guide) for each in erased)
            history.append({"step": step, "residual": residual})
            if self.skip_if_erased and residual > self.erased_threshold:
                break
            recovered = torch.cat([each.states.double() @ recover.T for each in erased])  # (n L, D)
            scales = 1.0, self.preserve_scale, self.update_regularisation
            weights = updated(weights, shared_update(recovered, guides, guides, *scales))
        return weights, history


def unreached(
    current: Collection[Tensor],
    original: Collection[Tensor],
    recover: Tensor,
    concept: Text,
    guide: Text,
) -> float:
    """How far the adversarial embedding c' = K c stays from the concept; 0 reaches it.

    sum ||W_l c' - W_l^orig c||^2 / sum ||W_l^orig g - W_l^orig c||^2, over all projections and the
    positions from the last token on, aligned with the guide's g. Scale-free: at 1, c' is no nearer
    to the concept than the guide is.
    """
    c, g = aligned(concept, guide, "from_last")  # (n, D) both
    distance = squared_distance(current, c.double() @ recover.T, original, c)
    return distance / squared_distance(original, g, original, c)
