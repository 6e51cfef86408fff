"""What the miniature can draw, and the captions it is trained on.

Subjects are Imagenette's ten classes and faces; styles are the five drawn ones of `styles.py`.
A subject has many names and descriptions, as in the world: the first is the one that prompts use
("an image of a parachute", the paper's wording), and the `implicit` ones occur in captions and in a
prompt set of their own, never in the prompts that a method is tuned or attacked with. Some captions
leave out the subject ("a photo in the style of pop art"), so that a style is a concept on its own.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from cad.concepts import with_article
from experiments.run.configuration import CONF

TEXTS = yaml.safe_load(Path(__file__).with_name("captions.yaml").read_text(encoding="utf-8"))
NAMES: dict[str, list[str]] = TEXTS["names"]
IMPLICIT: dict[str, list[str]] = yaml.safe_load(
    (CONF / "prompts" / "implicit.yaml").read_text(encoding="utf-8")
)["subjects"]
STYLE_NAMES: dict[str, list[str]] = TEXTS["styles"]
SUBJECTS: dict[str, str] = {subject: names[0] for subject, names in NAMES.items()}
STYLES: dict[str, str] = {style: names[0] for style, names in STYLE_NAMES.items()}
PLAIN = len(STYLES)  # index of "no style" beside the five styles
FIRST_NAME_SHARE = 0.4  # of a subject's or a style's captions; the other names share the rest
STYLE_SUFFIX = " in the style of {style}"
MAX_TOKENS = 32  # positions of the text encoder, start and end tokens included

Key = tuple[int | None, int]
"""(index into SUBJECTS or None, index into STYLES or PLAIN): what a caption says."""


def caption_table() -> dict[Key, dict[str, float]]:
    """Every caption of the training set and its probability, grouped by what it says."""
    styled, plain = TEXTS["subject_templates"], TEXTS["plain_templates"]
    table: dict[Key, dict[str, float]] = {}
    for i, subject in enumerate(SUBJECTS):
        names = shares((*NAMES[subject], *IMPLICIT[subject]))
        table[i, PLAIN] = _captions((*styled, *plain), names)
        for j, style_names in enumerate(STYLE_NAMES.values()):
            table[i, j] = {
                caption + STYLE_SUFFIX.format(style=style): p * q
                for caption, p in _captions(styled, names).items()
                for style, q in shares(style_names).items()
            }
    for j, style_names in enumerate(STYLE_NAMES.values()):
        table[None, j] = {
            template.format(style=style): p / len(TEXTS["style_templates"])
            for style, p in shares(style_names).items()
            for template in TEXTS["style_templates"]
        }
    return table


def shares(names: Sequence[str]) -> dict[str, float]:
    """How often each of a thing's names is used; they add up to one."""
    others = (1 - FIRST_NAME_SHARE) / (len(names) - 1)
    return {name: others if i else FIRST_NAME_SHARE for i, name in enumerate(names)}


def _captions(templates: Sequence[str], names: dict[str, float]) -> dict[str, float]:
    return {
        template.format(a_subject=with_article(name), subject=name): p / len(templates)
        for name, p in names.items()
        for template in templates
    }


class Captions:
    """The captions of `caption_table` in one list, `texts`, from which they are drawn."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._groups: dict[Key, tuple[int, list[float]]] = {}
        for key, group in caption_table().items():
            self._groups[key] = len(self.texts), list(itertools.accumulate(group.values()))
            self.texts += group

    def draw(self, key: Key, u: float) -> int:
        """The place in `texts` of the caption at quantile `u` in [0, 1) of what `key` says."""
        first, cumulative = self._groups[key]
        return first + min(bisect.bisect_right(cumulative, u), len(cumulative) - 1)


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary learned from the captions.

    Byte-level BPE as CLIP's own: each word of a caption becomes one token, any other text is
    spelled out, nothing is unknown. Deterministic.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = alphabet + [letter + "</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=letters,  # else it numbers them by a hash, and so merges in another order
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(Captions().texts, trainer)
    merges = [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = letters + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids padded to MAX_TOKENS, (N, MAX_TOKENS) int64."""
    padding = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
    ids: torch.Tensor = tokenizer(list(captions), **padding, return_tensors="pt").input_ids
    return ids
