"""Which images are asked for: prompts with their seeds, built from templates.

Published sets come as files (`evaluation.prompt_files`). Within a template set, prompts go round
the groups (first image of every group, second image of every group, ...), so a set with more images
of each group starts with the smaller set, and any prefix covers the groups evenly.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from cad.checks import seed, whole
from cad.concepts import with_article
from cad.errors import UserError
from cad.identity import Identified

OBJECT_TEMPLATE = "an image of {subject}"
MOST_IMAGES = 10**6  # of a set, whose files are numbered with six digits
STYLE_TEMPLATE = "an image of {subject} in the style of {style}"


@dataclass(frozen=True)
class Prompt:
    """One image to be made. `group` is what tables sort it under: a subject or style name."""

    text: str
    seed: int
    group: str
    guidance: float | None = None  # classifier-free guidance weight; None: the sampler's
    size: tuple[int, int] | None = None  # height, width in pixels; None: the model's own
    truncate: bool = False  # cut what the text encoder does not take, instead of refusing it
    id: str | None = None  # what the set's source calls it, such as COCO's image_id

    def own_settings(self) -> dict[str, Any]:
        """The image's own guidance and size, as JSON data; {} where it asks for neither."""
        guidance = {} if self.guidance is None else {"guidance": float(self.guidance)}
        return guidance | ({} if self.size is None else {"size": list(self.size)})


class PromptSet(Identified, ABC):
    """A named source of prompts. `build` is deterministic and returns at least one prompt."""

    name: str

    @abstractmethod
    def build(self) -> list[Prompt]:
        """All prompts of the set, in its fixed order."""

    def settings(self) -> dict[str, Any]:
        """As of every dataclass, but mappings keep their order: prompts go round them."""
        mappings = {k: in_order(v) for k, v in vars(self).items() if isinstance(v, Mapping)}
        return super().settings() | mappings


@dataclass(frozen=True)
class ObjectPrompts(PromptSet):
    """`images_per_class` prompts "an image of a parachute" for each of `subjects` {name: text}.

    The article is chosen by the text; `{subject}` in the template stands for article and text. A
    subject's images go round its texts where it has several.
    """

    subjects: Mapping[str, str | Sequence[str]]
    images_per_class: int
    seed: int
    template: str = OBJECT_TEMPLATE
    name: str = "objects"

    def __post_init__(self) -> None:
        _check_names(self.subjects, "prompts.subjects")
        _check_count("images_per_class", self.images_per_class, len(self.subjects))
        seed("prompts.seed", self.seed)
        _check_template(self.template, {"subject"})

    def build(self) -> list[Prompt]:
        subjects = {
            name: [with_article(text) for text in _texts(given)]
            for name, given in self.subjects.items()
        }
        return [
            Prompt(
                text=self.template.format(subject=texts[index % len(texts)]),
                seed=derive_seed(self.seed, name, index),
                group=name,
            )
            for index in range(self.images_per_class)
            for name, texts in subjects.items()
        ]


@dataclass(frozen=True)
class StylePrompts(PromptSet):
    """`images_per_class` prompts "an image of a church in the style of pop art" for each style.

    `styles` and `subjects` are {name: text}; a style's images cycle through the subjects, the
    styles in step, so that every style is asked of the same subjects. The group is the style.
    """

    styles: Mapping[str, str]
    subjects: Mapping[str, str]
    images_per_class: int
    seed: int
    template: str = STYLE_TEMPLATE
    name: str = "styles"

    def __post_init__(self) -> None:
        _check_names(self.styles, "prompts.styles")
        _check_names(self.subjects, "prompts.subjects")
        _check_count("images_per_class", self.images_per_class, len(self.styles))
        seed("prompts.seed", self.seed)
        _check_template(self.template, {"subject", "style"})

    def build(self) -> list[Prompt]:
        subjects = [with_article(subject) for subject in self.subjects.values()]
        return [
            Prompt(
                text=self.template.format(subject=subjects[index % len(subjects)], style=text),
                seed=derive_seed(self.seed, name, index),
                group=name,
            )
            for index in range(self.images_per_class)
            for name, text in self.styles.items()
        ]


@dataclass(frozen=True)
class CaptionPrompts(PromptSet):
    """`count` captions of mixed wording, one group: what a model must still draw after an edit.

    Caption i is of subject i mod S; subject by subject, in turns, it is plain ("a photo of a
    church") or in a style ("an image of a church in the style of pop art"), and goes round the
    styles and the wordings. `subjects` and `styles` are {name: text}.
    """

    subjects: Mapping[str, str]
    styles: Mapping[str, str]
    templates: Sequence[str]  # of a plain caption; {subject} stands for article and text
    style_suffix: str  # what a caption in a style ends with; {style} stands for its text
    count: int
    seed: int
    name: str = "captions"

    def __post_init__(self) -> None:
        _check_names(self.subjects, "prompts.subjects")
        _check_names(self.styles, "prompts.styles")
        for template in self.templates or [""]:
            _check_template(template, {"subject"}, "prompts.templates")
        _check_template(self.style_suffix, {"style"}, "prompts.style_suffix")
        _check_count("prompts.count", self.count)
        seed("prompts.seed", self.seed)

    def build(self) -> list[Prompt]:
        return [
            Prompt(self._caption(index), derive_seed(self.seed, self.name, index), self.name)
            for index in range(self.count)
        ]

    def _caption(self, index: int) -> str:
        turn, subject = divmod(index, len(self.subjects))
        # Of this subject the nth plain or the nth styled caption; n goes through all pairs.
        cycle, style = divmod(turn // 2, len(self.styles))
        template = self.templates[(cycle + style) % len(self.templates)]
        text = template.format(subject=with_article(list(self.subjects.values())[subject]))
        if (turn + subject) % 2 == 0:
            return text
        # Offset by the subject, so that one turn of all subjects shows all styles.
        chosen = list(self.styles.values())[(style + subject) % len(self.styles)]
        return text + self.style_suffix.format(style=chosen)


def build_prompts(prompt_set: PromptSet) -> list[Prompt]:
    """The set's prompts. UserError if there are none or one is empty."""
    prompts = prompt_set.build()
    if not prompts or not all(prompt.text.strip() for prompt in prompts):
        raise UserError(f"the prompt set {prompt_set.name!r} has no prompts, or an empty one")
    return prompts


def derive_seed(seed: int, group: str, index: int) -> int:
    """An image's own seed, in [0, 2^31): a hash of (seed, group, index) and of nothing else."""
    digest = hashlib.sha256(f"{seed}/{group}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def in_order(names: Mapping[str, str | Sequence[str]]) -> list[list[Any]]:
    """A mapping as JSON data that keeps its order, which hashes of objects do not."""
    return [[str(k), v if isinstance(v, str) else list(v)] for k, v in names.items()]


def _check_count(key: str, count: int, groups: int = 1) -> None:
    whole(1, MOST_IMAGES // groups)(key, count)


def _texts(text: str | Sequence[str]) -> Sequence[str]:
    return [text] if isinstance(text, str) else text


def _check_names(names: Mapping[str, str | Sequence[str]], key: str) -> None:
    if not names or not all(all(map(str.strip, _texts(text) or [""])) for text in names.values()):
        raise UserError(f"{key}={dict(names)} must map names to texts, such as church: church")


def _check_template(template: str, fields: set[str], key: str = "prompts.template") -> None:
    try:
        found = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError:  # a brace without its other
        found = set()
    if found != fields:
        wanted = ", ".join(f"{{{field}}}" for field in sorted(fields))
        raise UserError(f"{key}={template!r} must hold exactly these fields: {wanted}")
