"""RECE (Gong et al. 2024, arXiv 2407.12383): UCE, then rounds of recovering and erasing.

Each round derives, in closed form, the embedding that the edited projections read most like the
concept was read before, and erases that too. As released, an update starts from the projections as
they are then: what they make of the guide is the target, and they are what the update stays near.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from baselines.checks import check_count, checked_positive, checked_text
from baselines.closed_form import (
    FROM_LAST,
    Text,
    adversarial_map,
    aligned,
    encode,
    find_projections,
    naming,
    shared_update,
    squared_distance,
    updated,
)
from baselines.uce import UCE, check_guide
from cad.concepts import Concept
from cad.edits import Edit, Made
from cad.errors import UserError
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.weight_edit import Replace

ERASE_SCALE = 1.0  # of the rounds' updates, as released

Record = dict[str, float]


class StartingUCE(UCE):
    """The UCE that RECE starts from: its settings stand below `edit.uce`."""

    place = "edit.uce"


class RECE(Edit):
    """Starts from `uce`, then `epochs` rounds over all token positions of `concept.text`.

    regularisation: lambda of the adversarial embedding (paper Eq. 8); the smaller, the larger an
    embedding is still found and erased.
    update_regularisation, preserve_scale: lambda and s_p of the rounds' updates, which map the
    embeddings to `guide`, position by position, and keep it, once for each concept.
    skip_if_erased: stop before a round whose embeddings are further from each concept than
    `erased_threshold`, measured as `unreached` does. The history has that residual, the smallest
    over the concepts, by the number of rounds already made.

    Raises UserError for values that are not allowed.
    """

    name = "rece"

    def __init__(
        self,
        uce: UCE,
        epochs: int,
        regularisation: float,
        update_regularisation: float = 0.1,
        preserve_scale: float = 0.1,
        guide: str = " ",
        skip_if_erased: bool = False,
        erased_threshold: float = 0.5,
    ) -> None:
        _check_flags(uce, epochs, skip_if_erased)
        self.uce = uce
        self.epochs = epochs
        self.regularisation = checked_positive("edit.regularisation", regularisation)
        self.update_regularisation = checked_positive(
            "edit.update_regularisation", update_regularisation
        )
        self.preserve_scale = checked_positive("edit.preserve_scale", preserve_scale, zero=True)
        self.guide = checked_text("edit.guide", guide)
        self.skip_if_erased = skip_if_erased
        self.erased_threshold = checked_positive("edit.erased_threshold", erased_threshold)

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        check_guide("edit", self.guide, concepts)
        return {
            "uce": dict(self.uce.settings(concepts)),
            "epochs": self.epochs,
            "regularisation": self.regularisation,
            "update_regularisation": self.update_regularisation,
            "preserve_scale": self.preserve_scale,
            "guide": self.guide,
            "skip_if_erased": self.skip_if_erased,
            "erased_threshold": self.erased_threshold,
        }

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Made:
        with naming(self.name):
            original = find_projections(model)
            self.settings(concepts)
            with measure(model.device) as meter:
                edited, history = self.edited(model, original, concepts)
                changes = {name: Replace(edited[name].to(w.dtype)) for name, w in original.items()}
        return Made(changes, meter.cost, history)

    @torch.no_grad()
    def edited(
        self, model: DiffusionModel, original: Mapping[str, Tensor], concepts: Sequence[Concept]
    ) -> tuple[dict[str, Tensor], list[Record]]:
        """The projections (out, D) after all rounds, float32, and a record for each round."""
        texts = encode(model, [self.guide, *(concept.text for concept in concepts)])
        guide = texts[self.guide]
        erased = [texts[concept.text] for concept in concepts]
        guides = guide.states.repeat(len(erased), 1)  # (n L, D)
        weights = self.uce.edited(model, original, concepts)
        history: list[Record] = []
        for step in tqdm(range(self.epochs), desc=self.name, unit="round", disable=None):
            recover = adversarial_map(weights.values(), original.values(), self.regularisation)
            residual = min(
                unreached(weights.values(), original.values(), recover, text, guide)
                for text in erased
            )
            history.append({"step": step, "residual": residual})
            if self.skip_if_erased and residual > self.erased_threshold:
                break
            recovered = torch.cat([text.states.double() @ recover.T for text in erased])  # (n L, D)
            update = shared_update(
                recovered,
                guides,
                kept=guides,
                erase_scale=ERASE_SCALE,
                preserve_scale=self.preserve_scale,
                regularisation=self.update_regularisation,
            )
            weights = updated(weights, update)
        return weights, history


def unreached(
    current: Iterable[Tensor],
    original: Iterable[Tensor],
    recover: Tensor,
    concept: Text,
    guide: Text,
) -> float:
    """How far the adversarial embedding c' = K c stays from the concept; 0 reaches it.

    sum ||W_l c' - W_l^orig c||^2 / sum ||W_l^orig g - W_l^orig c||^2, over all projections and the
    positions from the last token on, aligned with the guide's g. Scale-free: at 1, c' is no nearer
    to the concept than the guide is. After UCE alone all W_l are W_l^orig (I + M) with one M, so an
    embedding that reaches the concept exists: how large one lambda allows is what decides.
    """
    original = list(original)
    c, g = aligned(concept, guide, FROM_LAST)  # (n, D) both
    distance = squared_distance(current, c.double() @ recover.T, original, c)
    return distance / squared_distance(original, g, original, c)


def _check_flags(uce: object, epochs: object, skip_if_erased: object) -> None:
    if not isinstance(uce, UCE):
        raise UserError(f"edit.uce={uce!r} is not allowed: it must be the UCE to start from.")
    check_count("edit.epochs", epochs, 0)
    if not isinstance(skip_if_erased, bool):
        raise UserError(
            f"edit.skip_if_erased={skip_if_erased!r} is not allowed: it must be true or false."
        )
