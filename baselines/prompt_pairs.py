"""Pairs of prompts, one with the concept and one without, as ConceptPrune has them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from cad.checks import check, text, texts
from cad.concepts import Concept, with_article
from cad.edits import Edit
from cad.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PromptPairs(Edit):
    """A method that compares prompts; UserError for templates that are not allowed.

    Each filler makes one pair of prompts and takes the place of {filler} in both templates; a
    concept template without it tells the same prompt against every base prompt.
    {concept} stands for the concept's text ("French horn"), {a_concept} for that with its article,
    {prompt} for its prompt ("naked").
    """

    base_template: str  # "a {filler}"
    concept_template: str  # "a {concept} in a {filler}"
    fillers: Sequence[str]  # "forest", "kitchen", ...; one pair each

    def __post_init__(self) -> None:
        check(self, "edit", base_template=text, concept_template=text, fillers=texts)
        concept = {"concept", "a_concept", "prompt"}
        self._check_template("base_template", {"filler"}, {"filler"})
        self._check_template("concept_template", concept, concept | {"filler"})
        if not self.fillers or not all(word.strip() for word in self.fillers):
            raise UserError(f"edit.fillers={self.fillers} is not allowed: it is a list of words.")

    def prompts(self, concept: Concept) -> tuple[list[str], list[str]]:
        """Base prompts and concept prompts; those at one place are a pair."""
        words = {"concept": concept.text, "prompt": concept.prompt}
        words["a_concept"] = with_article(concept.text)
        base = [self.base_template.format(filler=filler) for filler in self.fillers]
        told = [self.concept_template.format(filler=filler, **words) for filler in self.fillers]
        return base, told

    def _check_template(self, key: str, needed: set[str], allowed: set[str]) -> None:
        template = getattr(self, key)
        try:
            found = {field for _, field, *_ in string.Formatter().parse(template)} - {None}
        except ValueError as error:
            raise UserError(f"edit.{key}={template!r} is not a template: {error}.") from error
        if found - allowed or not found & needed:
            raise UserError(
                f"edit.{key}={template!r} is not allowed: it names {_braced(needed)}, and "
                f"nothing but {_braced(allowed)}."
            )


def _braced(names: set[str]) -> str:
    return " or ".join(f"{{{name}}}" for name in sorted(names))
