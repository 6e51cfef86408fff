"""Concepts: the things that are erased or amplified."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cad.checks import check, one_of, text
from cad.errors import UserError
from cad.identity import Identified

KINDS = ("object", "style", "explicit")
_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Concept(Identified):
    """A concept and its prompts (paper Sec. 4; the prompts of conf/concept/NAME.yaml).

    Raises UserError for a name that is not snake_case, an unknown kind, or an empty text or prompt.
    """

    name: str  # snake_case, as in conf/concept/NAME.yaml: "french_horn"
    kind: str  # one of KINDS
    text: str  # as written in prompts: "French horn", "pop art"
    prompt: str  # c of Eq. 4: "French horn"; "a photo in the style of Monet"; "naked"
    base_prompt: str = ""  # c_b of Eq. 4; empty is the unconditional model

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"concept.name={self.name!r} is not snake_case: write it as in conf/concept/, "
                "for example 'french_horn'."
            )
        check(self, "concept", kind=one_of(KINDS), text=text, prompt=text, base_prompt=text)
        for key in ("text", "prompt"):
            if not getattr(self, key).strip():
                raise UserError(f"concept.{key} of {self.name!r} is empty; write the words for it.")
        if self.prompt == self.base_prompt:
            raise UserError(
                f"concept.prompt and concept.base_prompt of {self.name!r} are both "
                f"{self.prompt!r}: the objective of Eq. 4 would be zero everywhere."
            )


def of_prompt(prompt: str) -> Concept:
    """A concept that is a prompt and no more."""
    name = "_".join(re.findall(r"[a-z0-9]+", prompt.lower()))
    return Concept(name or "preserved", "object", prompt, prompt)


def beside(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """The prompts that are neither prompt nor text of one of the concepts, each once."""
    taken = {each.strip().lower() for c in concepts for each in (c.prompt, c.text)}
    return list(dict.fromkeys(each for each in prompts if each.strip().lower() not in taken))


def with_article(noun: str) -> str:
    """The noun after its indefinite article: "a French horn", "an English springer"."""
    return f"{'an' if noun[:1] in 'aeiouAEIOU' else 'a'} {noun}"
