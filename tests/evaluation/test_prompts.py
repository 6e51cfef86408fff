"""Template prompt sets: wording, seeds, and that larger sets contain smaller ones."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from cad.errors import UserError
from cad.identity import digest
from evaluation.prompts import (
    CaptionPrompts,
    ObjectPrompts,
    Prompt,
    StylePrompts,
    build_prompts,
    derive_seed,
)

SUBJECTS = {"church": "church", "english_springer": "English springer", "face": "face"}
STYLES = {"pop_art": "pop art", "woodcut": "woodcut"}
TEMPLATES = ("a photo of {subject}", "a picture of {subject}")
SUFFIX = " in the style of {style}"


def objects(**changes: Any) -> ObjectPrompts:
    return ObjectPrompts(**{"subjects": SUBJECTS, "images_per_class": 2, "seed": 0} | changes)


def styles(**changes: Any) -> StylePrompts:
    settings = {"styles": STYLES, "subjects": SUBJECTS, "images_per_class": 4, "seed": 0}
    return StylePrompts(**settings | changes)


def captions(**changes: Any) -> CaptionPrompts:
    settings = {"subjects": SUBJECTS, "styles": STYLES, "templates": TEMPLATES, "count": 24}
    return CaptionPrompts(**settings | {"style_suffix": SUFFIX, "seed": 0} | changes)


def test_objects_are_worded_as_published_and_go_round_the_subjects():
    prompts = build_prompts(objects())
    assert [prompt.text for prompt in prompts[:3]] == [
        "an image of a church",
        "an image of an English springer",
        "an image of a face",
    ]
    assert [prompt.group for prompt in prompts] == 2 * list(SUBJECTS)


def test_images_of_a_subject_go_round_its_texts() -> None:
    prompts = ObjectPrompts({"church": ["chapel", "abbey"], "face": "portrait"}, 3, seed=0)
    texts = [prompt.text for prompt in build_prompts(prompts) if prompt.group == "church"]
    assert texts == ["an image of a chapel", "an image of an abbey", "an image of a chapel"]
    told = [["church", ["chapel", "abbey"]], ["face", "portrait"]]
    assert prompts.settings()["subjects"] == told
    with pytest.raises(UserError, match="must map names to texts"):
        ObjectPrompts({"church": []}, 1, seed=0)


def test_styles_cycle_the_subjects_and_are_grouped_by_style():
    prompts = build_prompts(styles())
    assert prompts[0].text == "an image of a church in the style of pop art"
    assert prompts[3].text == "an image of an English springer in the style of woodcut"
    assert Counter(prompt.group for prompt in prompts) == {"pop_art": 4, "woodcut": 4}
    pop_art = [prompt.text for prompt in prompts if prompt.group == "pop_art"]
    assert pop_art[3] == pop_art[0]
    assert len(set(pop_art)) == 3


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (objects(images_per_class=3), objects(images_per_class=8)),
        (captions(count=20), captions(count=50)),
    ],
)
def test_a_larger_set_starts_with_the_smaller_one(small, large):
    prompts = build_prompts(small)
    assert build_prompts(large)[: len(prompts)] == prompts


def test_seeds_are_pinned_distinct_and_depend_on_nothing_else():
    # sha256("0/church/0") starts with 48f9d524; without the lowest bit, 31 bits are left.
    assert derive_seed(0, "church", 0) == int("48f9d524", 16) >> 1
    prompts = build_prompts(objects(images_per_class=50))
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    assert all(0 <= prompt.seed < 2**31 for prompt in prompts)
    face = {"subjects": {"face": "face"}, "images_per_class": 50}
    alone = build_prompts(objects(**face))
    assert alone == [prompt for prompt in prompts if prompt.group == "face"]
    other = build_prompts(objects(**face, seed=1))
    assert {prompt.seed for prompt in other}.isdisjoint(prompt.seed for prompt in alone)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (objects, {"images_per_class": 0}, "images_per_class=0"),
        (objects, {"images_per_class": 1.5}, "images_per_class=1.5"),
        (objects, {"subjects": {}}, r"prompts\.subjects="),
        (objects, {"template": "an image of {style}"}, r"prompts\.template"),
        (objects, {"template": "an image of {subject"}, r"prompts\.template"),
        (styles, {"styles": {"pop_art": " "}}, r"prompts\.styles=.*pop_art"),
        (captions, {"templates": ["a photo"]}, r"prompts\.templates=.*\{subject\}"),
        (captions, {"templates": []}, r"prompts\.templates="),
        (captions, {"style_suffix": ""}, r"prompts\.style_suffix"),
        (captions, {"count": 0}, r"prompts\.count=0"),
    ],
)
def test_bad_sets_are_refused_with_their_key(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_a_set_is_told_apart_by_all_that_its_prompts_depend_on():
    """Also by the order of its names, which the prompts go round."""
    sets = [
        objects(),
        objects(subjects=dict(reversed(SUBJECTS.items()))),
        objects(images_per_class=3),
        objects(seed=1),
        objects(name="other"),
        styles(),
        captions(),
        captions(templates=TEMPLATES[::-1]),
    ]
    assert len({digest(each.identity()) for each in sets}) == len(sets)
    assert objects(subjects=dict(SUBJECTS)).identity() == sets[0].identity()


def test_sets_of_any_source_are_checked():
    for prompts in ([Prompt("a church", 0, "x"), Prompt(" ", 0, "x")], []):
        with pytest.raises(UserError, match="'fixed' has no prompts, or an empty one"):
            build_prompts(SimpleNamespace(name="fixed", build=lambda found=prompts: found))


def test_captions_alternate_plain_and_styled_and_go_round_everything():
    texts = [prompt.text for prompt in build_prompts(captions())]
    assert texts[:6] == [
        "a photo of a church",
        "a photo of an English springer in the style of woodcut",
        "a photo of a face",
        "a photo of a church in the style of pop art",
        "a photo of an English springer",
        "a photo of a face in the style of pop art",
    ]
    assert texts[::3] == [
        "a photo of a church",
        "a photo of a church in the style of pop art",
        "a picture of a church",
        "a picture of a church in the style of woodcut",
        "a picture of a church",
        "a picture of a church in the style of pop art",
        "a photo of a church",
        "a photo of a church in the style of woodcut",
    ]


def test_captions_are_one_group_of_distinct_seeds():
    prompts = build_prompts(captions(count=50, seed=3, name="mixed"))
    assert {prompt.group for prompt in prompts} == {"mixed"}
    assert len({prompt.seed for prompt in prompts}) == 50
    assert prompts[7].seed == derive_seed(3, "mixed", 7)


def test_a_prompt_tells_what_it_asks_for_beside_text_and_seed():
    assert Prompt("a church", 0, "church", truncate=True, id="3").own_settings() == {}
    asking = Prompt("a church", 0, "church", guidance=7, size=(384, 512))
    assert asking.own_settings() == {"guidance": 7.0, "size": [384, 512]}
    assert Prompt("a church", 0, "church", guidance=0).own_settings() == {"guidance": 0.0}
