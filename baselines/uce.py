"""UCE, Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761): one linear solve.

The key and value projections of cross-attention are changed so that they read the concept as they
read a guide text before, and the kept texts as before. Two published versions differ in which
tokens of a text this is said of: see `positions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.closed_form import (
    POSITIONS,
    aligned,
    edited_projections,
    encode,
    shared_update,
    to_keep,
    updated,
)
from cad.checks import check, flag, not_negative, one_of, optional, positive, text, texts
from cad.concepts import Concept
from cad.edits import Edit
from cad.errors import UserError
from cad.identity import material
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit

CONCEPT = "{concept}"  # in templates


@dataclass(frozen=True)
class UCE(Edit):
    """Maps `concept.text`, through the templates, to the guide (paper Eq. 7).

    UserError for a value that is not allowed.
    """

    name: ClassVar[str] = "uce"
    place: ClassVar[str] = "edit"  # where its settings stand in the configuration

    guide: str  # read in place of the concept
    preserve: Sequence[str]  # texts to keep, but for those of the erased concepts
    erase_scale: float = 1.0  # s_e of the objective (`closed_form.shared_update`)
    preserve_scale: float | None = None  # s_p; None: max(0.1, 1 / kept texts), to three decimals
    regularisation: float = 0.5  # lambda
    positions: str = "from_last"  # see `closed_form.aligned` and `to_keep`
    templates: Sequence[str] = (CONCEPT,)  # for the erased texts, which are their "{concept}"
    # For "art" and "style of Van Gogh": false reads "art" (earlier releases), true "style of art".
    expand_guide: bool = False

    def __post_init__(self) -> None:
        check(self, self.place, guide=text, preserve=texts, templates=texts)
        check(self, self.place, erase_scale=positive, preserve_scale=optional(not_negative))
        check(self, self.place, regularisation=positive, positions=one_of(POSITIONS))
        check(self, self.place, expand_guide=flag)
        if not self.templates or not all(CONCEPT in each for each in self.templates):
            raise UserError(
                f"{self.place}.templates={self.templates} is not allowed: each names {CONCEPT}."
            )

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        check_guide(self.place, self.guide, concepts)
        kept = to_preserve(self.preserve, concepts)
        scale = self._preserve_scale(len(kept))
        return material(self) | {"preserve": kept, "preserve_scale": scale}

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        check_guide(self.place, self.guide, concepts)
        return edited_projections(model, lambda w: (self.edited(model, w, concepts), ()))

    def edited(
        self, model: DiffusionModel, weights: Mapping[str, Tensor], concepts: Sequence[Concept]
    ) -> dict[str, Tensor]:
        """The projections (out, D) after the update, float32. UserError for texts too long."""
        pairs = self._pairs(concepts)
        kept = to_preserve(self.preserve, concepts)
        encoded = encode(model, [*chain(*pairs), *kept])
        c, g = zip(
            *(aligned(encoded[text], encoded[guide], self.positions) for text, guide in pairs),
            strict=True,
        )
        keep = [to_keep(encoded[each], self.positions) for each in kept]
        update = shared_update(
            torch.cat(c),  # (n, D)
            torch.cat(g),  # (n, D)
            torch.cat([c[0][:0], *keep]),  # (m, D)
            self.erase_scale,
            self._preserve_scale(len(kept)),
            self.regularisation,
        )
        return updated(weights, update)

    def _pairs(self, concepts: Sequence[Concept]) -> list[tuple[str, str]]:
        """Every text to erase, in every template, with its guide."""
        return [
            (
                template.replace(CONCEPT, concept.text),
                template.replace(CONCEPT, self.guide) if self.expand_guide else self.guide,
            )
            for concept in concepts
            for template in self.templates
        ]

    def _preserve_scale(self, kept: int) -> float:
        if self.preserve_scale is not None:
            return self.preserve_scale
        return round(max(0.1, 1 / kept), 3) if kept else 0.0


def to_preserve(texts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """The texts to keep when these concepts are erased, each once."""
    erased = {concept.text.strip().lower() for concept in concepts}
    return list(dict.fromkeys(each for each in texts if each.strip().lower() not in erased))


def check_guide(place: str, guide: str, concepts: Sequence[Concept]) -> None:
    """UserError if the guide is one of the concepts: nothing would be erased."""
    for concept in concepts:
        if concept.text.strip().lower() == guide.strip().lower():
            raise UserError(
                f"{place}.guide={guide!r} is the text of concept={concept.name}, which is to be "
                "erased: name another text, or ' '."
            )
