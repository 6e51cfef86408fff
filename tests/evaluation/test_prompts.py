"""Template prompt sets: wording, seeds, and that larger sets contain smaller ones."""

from __future__ import annotations

from collections import Counter

import pytest

from cad.errors import UserError
from evaluation.prompts import (
    ObjectPrompts,
    Prompt,
    PromptSet,
    StylePrompts,
    build_prompts,
    derive_seed,
    with_article,
)

SUBJECTS = {"church": "church", "english_springer": "English springer", "face": "face"}
STYLES = {"pop_art": "pop art", "woodcut": "woodcut"}


class FixedPrompts(PromptSet):
    def __init__(self, *texts: str) -> None:
        self.name = "fixed"
        self.texts = texts

    def build(self) -> list[Prompt]:
        return [Prompt(text, 0, "x") for text in self.texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parachute", "a parachute"),
        ("English springer", "an English springer"),
        ("French horn", "a French horn"),
        ("apple", "an apple"),
    ],
)
def test_article(text: str, expected: str) -> None:
    assert with_article(text) == expected


def test_objects_are_worded_as_published_and_go_round_the_subjects() -> None:
    prompts = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=2, seed=0))
    assert [prompt.text for prompt in prompts[:3]] == [
        "an image of a church",
        "an image of an English springer",
        "an image of a face",
    ]
    assert [prompt.group for prompt in prompts] == 2 * list(SUBJECTS)


def test_styles_cycle_the_subjects_and_are_grouped_by_style() -> None:
    prompts = build_prompts(StylePrompts(STYLES, SUBJECTS, images_per_class=4, seed=0))
    assert prompts[0].text == "an image of a church in the style of pop art"
    assert prompts[3].text == "an image of an English springer in the style of woodcut"
    assert Counter(prompt.group for prompt in prompts) == {"pop_art": 4, "woodcut": 4}
    pop_art = [prompt.text for prompt in prompts if prompt.group == "pop_art"]
    assert pop_art[3] == pop_art[0]
    assert len(set(pop_art)) == 3


def test_a_larger_set_starts_with_the_smaller_one() -> None:
    small = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=3, seed=5))
    large = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=8, seed=5))
    assert large[: len(small)] == small


def test_seeds_are_pinned_distinct_and_depend_on_nothing_else() -> None:
    # sha256("0/church/0") starts with 48f9d524; without the lowest bit, 31 bits are left.
    assert derive_seed(0, "church", 0) == int("48f9d524", 16) >> 1
    prompts = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=50, seed=0))
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    assert all(0 <= prompt.seed < 2**31 for prompt in prompts)
    alone = build_prompts(ObjectPrompts({"face": "face"}, images_per_class=50, seed=0))
    assert alone == [prompt for prompt in prompts if prompt.group == "face"]
    other = build_prompts(ObjectPrompts({"face": "face"}, images_per_class=50, seed=1))
    assert {prompt.seed for prompt in other}.isdisjoint(prompt.seed for prompt in alone)


def test_any_prefix_covers_the_groups() -> None:
    prompts = build_prompts(ObjectPrompts(SUBJECTS, 4, 0))
    assert {prompt.group for prompt in prompts[: len(SUBJECTS)]} == set(SUBJECTS)


def test_bad_sets_are_refused_with_their_key() -> None:
    with pytest.raises(UserError, match="images_per_class=0"):
        ObjectPrompts(SUBJECTS, images_per_class=0, seed=0)
    with pytest.raises(UserError, match=r"prompts\.subjects is empty"):
        ObjectPrompts({}, images_per_class=1, seed=0)
    with pytest.raises(UserError, match=r"prompts\.styles\.pop_art"):
        StylePrompts({"pop_art": " "}, SUBJECTS, images_per_class=1, seed=0)
    with pytest.raises(UserError, match=r"prompts\.template"):
        ObjectPrompts(SUBJECTS, images_per_class=1, seed=0, template="an image of {style}")


def test_sets_of_any_source_are_checked() -> None:
    with pytest.raises(UserError, match="prompt 1 of the set 'fixed' is empty"):
        build_prompts(FixedPrompts("a church", " "))
    with pytest.raises(UserError, match="has no prompts"):
        build_prompts(FixedPrompts())
