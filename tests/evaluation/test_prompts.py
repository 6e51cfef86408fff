"""Template prompt sets: wording, seeds, and that larger sets contain smaller ones."""

from __future__ import annotations

from collections import Counter

import pytest

from cad.concepts import with_article
from cad.errors import UserError
from cad.identity import digest
from evaluation.prompts import (
    CaptionPrompts,
    ObjectPrompts,
    Prompt,
    PromptSet,
    StylePrompts,
    build_prompts,
    derive_seed,
)

SUBJECTS = {"church": "church", "english_springer": "English springer", "face": "face"}
STYLES = {"pop_art": "pop art", "woodcut": "woodcut"}
TEMPLATES = ("a photo of {subject}", "a picture of {subject}")
SUFFIX = " in the style of {style}"


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
def test_article(text, expected):
    assert with_article(text) == expected


def test_objects_are_worded_as_published_and_go_round_the_subjects():
    prompts = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=2, seed=0))
    assert [prompt.text for prompt in prompts[:3]] == [
        "an image of a church",
        "an image of an English springer",
        "an image of a face",
    ]
    assert [prompt.group for prompt in prompts] == 2 * list(SUBJECTS)


def test_styles_cycle_the_subjects_and_are_grouped_by_style():
    prompts = build_prompts(StylePrompts(STYLES, SUBJECTS, images_per_class=4, seed=0))
    assert prompts[0].text == "an image of a church in the style of pop art"
    assert prompts[3].text == "an image of an English springer in the style of woodcut"
    assert Counter(prompt.group for prompt in prompts) == {"pop_art": 4, "woodcut": 4}
    pop_art = [prompt.text for prompt in prompts if prompt.group == "pop_art"]
    assert pop_art[3] == pop_art[0]
    assert len(set(pop_art)) == 3


def test_a_larger_set_starts_with_the_smaller_one():
    small = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=3, seed=5))
    large = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=8, seed=5))
    assert large[: len(small)] == small


def test_seeds_are_pinned_distinct_and_depend_on_nothing_else():
    # sha256("0/church/0") starts with 48f9d524; without the lowest bit, 31 bits are left.
    assert derive_seed(0, "church", 0) == int("48f9d524", 16) >> 1
    prompts = build_prompts(ObjectPrompts(SUBJECTS, images_per_class=50, seed=0))
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    assert all(0 <= prompt.seed < 2**31 for prompt in prompts)
    alone = build_prompts(ObjectPrompts({"face": "face"}, images_per_class=50, seed=0))
    assert alone == [prompt for prompt in prompts if prompt.group == "face"]
    other = build_prompts(ObjectPrompts({"face": "face"}, images_per_class=50, seed=1))
    assert {prompt.seed for prompt in other}.isdisjoint(prompt.seed for prompt in alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_class": 0}, "images_per_class=0"),
        ({"images_per_class": 1.5}, "images_per_class=1.5"),
        ({"subjects": {}}, r"prompts\.subjects="),
        ({"template": "an image of {style}"}, r"prompts\.template"),
        ({"template": "an image of {subject"}, r"prompts\.template"),
    ],
)
def test_bad_sets_are_refused_with_their_key(changes, message):
    with pytest.raises(UserError, match=message):
        ObjectPrompts(**{"subjects": SUBJECTS, "images_per_class": 1, "seed": 0} | changes)


def test_bad_styles_are_refused_with_their_key():
    with pytest.raises(UserError, match=r"prompts\.styles=.*pop_art"):
        StylePrompts({"pop_art": " "}, SUBJECTS, images_per_class=1, seed=0)


def test_a_set_is_told_apart_by_all_that_its_prompts_depend_on():
    """Also by the order of its names, which the prompts go round."""
    sets = [
        ObjectPrompts(SUBJECTS, 2, 0),
        ObjectPrompts(dict(reversed(SUBJECTS.items())), 2, 0),
        ObjectPrompts(SUBJECTS, 3, 0),
        ObjectPrompts(SUBJECTS, 2, 1),
        ObjectPrompts(SUBJECTS, 2, 0, name="other"),
        StylePrompts(STYLES, SUBJECTS, 2, 0),
        CaptionPrompts(SUBJECTS, STYLES, TEMPLATES, SUFFIX, 2, 0),
        CaptionPrompts(SUBJECTS, STYLES, TEMPLATES[::-1], SUFFIX, 2, 0),
    ]
    assert len({digest(each.identity()) for each in sets}) == len(sets)
    assert ObjectPrompts(dict(SUBJECTS), 2, 0).identity() == sets[0].identity()


def test_sets_of_any_source_are_checked():
    with pytest.raises(UserError, match="an empty one"):
        build_prompts(FixedPrompts("a church", " "))
    with pytest.raises(UserError, match="has no prompts"):
        build_prompts(FixedPrompts())


def test_captions_alternate_plain_and_styled_and_go_round_everything():
    captions = CaptionPrompts(SUBJECTS, STYLES, TEMPLATES, SUFFIX, count=24, seed=0)
    texts = [prompt.text for prompt in build_prompts(captions)]
    assert texts[:6] == [
        "a photo of a church",
        "a photo of an English springer in the style of woodcut",
        "a photo of a face",
        "a photo of a church in the style of pop art",
        "a photo of an English springer",
        "a photo of a face in the style of pop art",
    ]
    church = texts[::3]
    assert church == [
        "a photo of a church",
        "a photo of a church in the style of pop art",
        "a picture of a church",
        "a picture of a church in the style of woodcut",
        "a picture of a church",
        "a picture of a church in the style of pop art",
        "a photo of a church",
        "a photo of a church in the style of woodcut",
    ]


def test_captions_are_one_group_of_distinct_seeds_and_start_with_the_smaller_set():
    large = build_prompts(CaptionPrompts(SUBJECTS, STYLES, TEMPLATES, SUFFIX, 50, 3, "mixed"))
    assert {prompt.group for prompt in large} == {"mixed"}
    assert len({prompt.seed for prompt in large}) == 50
    assert large[7].seed == derive_seed(3, "mixed", 7)
    small = build_prompts(CaptionPrompts(SUBJECTS, STYLES, TEMPLATES, SUFFIX, 20, 3, "mixed"))
    assert large[:20] == small


@pytest.mark.parametrize(
    ("templates", "suffix", "count", "message"),
    [
        (["a photo"], SUFFIX, 6, r"prompts\.templates=.*\{subject\}"),
        (TEMPLATES, "", 6, r"prompts\.style_suffix"),
        ([], SUFFIX, 6, r"prompts\.templates="),
        (TEMPLATES, SUFFIX, 0, r"prompts\.count=0"),
    ],
)
def test_bad_captions_are_refused_with_their_key(templates, suffix, count, message):
    with pytest.raises(UserError, match=message):
        CaptionPrompts(SUBJECTS, STYLES, templates, suffix, count=count, seed=0)


def test_a_prompt_tells_what_it_asks_for_beside_text_and_seed():
    assert Prompt("a church", 0, "church", truncate=True, id="3").own_settings() == {}
    asking = Prompt("a church", 0, "church", guidance=7, size=(384, 512))
    assert asking.own_settings() == {"guidance": 7.0, "size": [384, 512]}
    assert Prompt("a church", 0, "church", guidance=0).own_settings() == {"guidance": 0.0}
