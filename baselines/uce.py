"""UCE, Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761): one linear solve.

The key and value projections of cross-attention are changed so that they read the concept as they
read a guide text before, and the kept texts as before. Two published versions differ in which
tokens of a text this is said of: see `positions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.checks import checked_positive, checked_text, checked_texts
from baselines.closed_form import (
    POSITIONS,
    aligned,
    encode,
    find_projections,
    naming,
    shared_update,
    to_keep,
    updated,
)
from cad.concepts import Concept
from cad.edits import Edit, Made
from cad.errors import UserError
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.weight_edit import Replace

CONCEPT = "{concept}"  # in templates


class UCE(Edit):
    """Maps `concept.text`, through the templates, to the guide (paper Eq. 7).

    guide: what the concept is read as, not put through the templates ("art" for each of "painting
    by Van Gogh", "style of Van Gogh", as released).
    preserve: texts to keep, through the templates too; those of the erased concepts, in any case
    of letters, are left out. An empty one is kept as it is.
    erase_scale, preserve_scale, regularisation: s_e, s_p and lambda of the objective
    (`closed_form.shared_update`); preserve_scale None is max(0.1, 1 / number of kept texts, with
    their templates).
    positions: "last": the last token of erased and kept texts; "from_last": of erased texts all
    positions from the last token on, of kept ones all.
    templates: with "{concept}" for the text; ["{concept}"] is the text alone.

    Raises UserError for values that are not allowed.
    """

    name = "uce"
    place: ClassVar[str] = "edit"  # where its settings stand in the configuration

    def __init__(
        self,
        guide: str,
        preserve: Sequence[str],
        erase_scale: float = 1.0,
        preserve_scale: float | None = None,
        regularisation: float = 0.5,
        positions: str = "from_last",
        templates: Sequence[str] = (CONCEPT,),
    ) -> None:
        self.guide = checked_text(f"{self.place}.guide", guide)
        self.preserve = checked_texts(f"{self.place}.preserve", preserve)
        self.erase_scale = checked_positive(f"{self.place}.erase_scale", erase_scale)
        self.preserve_scale: float | None = None
        if preserve_scale is not None:
            key = f"{self.place}.preserve_scale"
            self.preserve_scale = checked_positive(key, preserve_scale, zero=True)
        self.regularisation = checked_positive(f"{self.place}.regularisation", regularisation)
        if positions not in POSITIONS:
            raise UserError(
                f"{self.place}.positions={positions!r} is unknown; allowed: {', '.join(POSITIONS)}."
            )
        self.positions = positions
        self.templates = checked_texts(f"{self.place}.templates", templates)
        if not self.templates or not all(CONCEPT in each for each in self.templates):
            raise UserError(
                f"{self.place}.templates={self.templates} is not allowed: it must be a list of "
                f"texts with {CONCEPT} in each, such as ['{CONCEPT}', 'image of {CONCEPT}']."
            )

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        check_guide(self.place, self.guide, concepts)
        kept = self._kept(concepts)
        return {
            "guide": self.guide,
            "preserve": kept,
            "erase_scale": self.erase_scale,
            "preserve_scale": self._preserve_scale(len(kept)),
            "regularisation": self.regularisation,
            "positions": self.positions,
            "templates": self.templates,
        }

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> Made:
        with naming(self.name):
            original = find_projections(model)
            check_guide(self.place, self.guide, concepts)
            with measure(model.device) as meter:
                edited = self.edited(model, original, concepts)
                changes = {name: Replace(edited[name].to(w.dtype)) for name, w in original.items()}
        return Made(changes, meter.cost)

    @torch.no_grad()
    def edited(
        self, model: DiffusionModel, weights: Mapping[str, Tensor], concepts: Sequence[Concept]
    ) -> dict[str, Tensor]:
        """The projections (out, D) after the update, float32. UserError for texts too long."""
        erased = self._expanded(concept.text for concept in concepts)
        kept = self._kept(concepts)
        texts = encode(model, [*erased, self.guide, *kept])
        guide = texts[self.guide]
        pairs = [aligned(texts[text], guide, self.positions) for text in erased]
        keep = [to_keep(texts[text], self.positions) for text in kept]
        nothing = guide.states[:0]  # (0, D)
        update = shared_update(
            torch.cat([nothing, *(c for c, _ in pairs)]),  # (n, D)
            torch.cat([nothing, *(g for _, g in pairs)]),  # (n, D)
            torch.cat([nothing, *keep]),  # (m, D)
            self.erase_scale,
            self._preserve_scale(len(kept)),
            self.regularisation,
        )
        return updated(weights, update, self.name)

    def _expanded(self, texts: Iterable[str]) -> list[str]:
        """Every text in every template; an empty one alone."""
        return [
            template.replace(CONCEPT, text)
            for text in texts
            for template in (self.templates if text.strip() else (CONCEPT,))
        ]

    def _kept(self, concepts: Sequence[Concept]) -> list[str]:
        """What is kept when these concepts are erased, in the templates, each once."""
        erased = {plain(concept.text) for concept in concepts}
        return list(
            dict.fromkeys(self._expanded(t for t in self.preserve if plain(t) not in erased))
        )

    def _preserve_scale(self, kept: int) -> float:
        if self.preserve_scale is not None:
            return self.preserve_scale
        return max(0.1, 1 / kept) if kept else 0.0


def plain(text: str) -> str:
    """The text for comparison with others."""
    return text.strip().lower()


def check_guide(place: str, guide: str, concepts: Sequence[Concept]) -> None:
    """UserError if the guide is one of the concepts: nothing would be erased."""
    for concept in concepts:
        if plain(concept.text) == plain(guide):
            raise UserError(
                f"{place}.guide={guide!r} is the text of concept={concept.name}, which is to be "
                "erased: name another text, or ' '."
            )
