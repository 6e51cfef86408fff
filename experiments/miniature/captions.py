"""What the miniature can draw, and the captions it is trained on.

Subjects are Imagenette's ten classes and faces; styles are the five drawn ones of `styles.py`.
The wording is the paper's ("an image of a parachute"), and some captions leave out the subject
("a photo in the style of pop art"), so that a style is a concept on its own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from cad.concepts import with_article

SUBJECTS: dict[str, str] = {
    "tench": "tench",
    "english_springer": "English springer",
    "cassette_player": "cassette player",
    "chain_saw": "chain saw",
    "church": "church",
    "french_horn": "French horn",
    "garbage_truck": "garbage truck",
    "gas_pump": "gas pump",
    "golf_ball": "golf ball",
    "parachute": "parachute",
    "face": "face",
}
STYLES: dict[str, str] = {
    "pencil_sketch": "pencil sketch",
    "woodcut": "woodcut",
    "pop_art": "pop art",
    "pointillism": "pointillism",
    "stained_glass": "stained glass",
}
PLAIN = len(STYLES)  # index of "no style" beside the five styles
SUBJECT_TEMPLATES = (
    "an image of {a_subject}",
    "a photo of {a_subject}",
    "a picture of {a_subject}",
    "{a_subject}",
    "{subject}",
)
STYLE_TEMPLATES = ("a photo in the style of {style}", "an image in the style of {style}", "{style}")
STYLE_SUFFIX = " in the style of {style}"
MAX_TOKENS = 32  # positions of the text encoder, start and end tokens included

Key = tuple[int | None, int]
"""(index into SUBJECTS or None, index into STYLES or PLAIN): what a caption says."""


def caption_table() -> dict[Key, list[str]]:
    """Every caption of the training set, grouped by what it says."""
    table: dict[Key, list[str]] = {}
    for i, subject in enumerate(SUBJECTS.values()):
        plain = [
            t.format(a_subject=with_article(subject), subject=subject) for t in SUBJECT_TEMPLATES
        ]
        table[i, PLAIN] = plain
        for j, style in enumerate(STYLES.values()):
            table[i, j] = [caption + STYLE_SUFFIX.format(style=style) for caption in plain]
    for j, style in enumerate(STYLES.values()):
        table[None, j] = [template.format(style=style) for template in STYLE_TEMPLATES]
    return table


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary learned from the captions.

    Byte-level BPE as CLIP's own: each word of a caption becomes one token, any other text is
    spelled out, nothing is unknown. Deterministic.
    """
    corpus = itertools.chain.from_iterable(caption_table().values())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = _merges(bpe)
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    pairs = json.loads(bpe.to_str())["model"]["merges"]
    return [(left, right) for left, right in pairs]


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids padded to MAX_TOKENS, (N, MAX_TOKENS) int64."""
    encoded = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    ids: torch.Tensor = encoded.input_ids
    return ids
