"""Random weights of the published architectures: to measure time and memory, and to test with.

The configurations are the published ones (architectures/*.json, in the keys of diffusers and
transformers). The values are noise, so no image means anything. Nor do token ids: the tokenizers
know the bytes or letters and the words below, and fill up with tokens that no text contains.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from cad.checks import one_of
from cad.errors import UserError

ARCHITECTURES = Path(__file__).parent / "architectures"
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}

# Primes: a weight that needs more numbers than this does not repeat row by row.
NOISE = 16_777_213  # numbers drawn for full size, below 2^24
SMALL_NOISE = 1_048_573  # for small widths, below 2^20

START, END = "<|startoftext|>", "<|endoftext|>"  # of a text, for CLIP
WORD_END = "</w>"
SPACE = "\u2581"  # before a word, for T5
LETTER_SCORE, WORD_SCORE, UNUSED_SCORE = -3.0, -1.0, -100.0  # log probabilities of T5's tokens

# One token each, so that prompts keep below 77: the words of conf/concept and of usual captions.
WORDS = """
a an and at by for from in is of on the to with art artist artwork color image images oil
painting paintings photo photograph picture portrait scene sketch style tench english springer
cassette player chain saw church french horn garbage truck gas pump golf ball parachute face
naked nude nudity body person people man men woman women lady gentleman couple dancer model
swimmer soldier child boy girl andy warhol caravaggio pablo picasso rembrandt van gogh vincent
pencil woodcut pop pointillism stained glass forest kitchen street park living room garden
desert field city warehouse house tree river mountain bridge boat flower horse village table
sky water beach building car dog cat road snow small large big old young red blue green yellow
black white one two standing sitting holding
""".split()  # noqa: SIM905


def random_pipeline(
    pipeline_class: type[Any],
    architecture: str,
    dtype: torch.dtype,
    *,
    without: Collection[str] = (),
    small: bool = False,
    device: str | torch.device = "cpu",
) -> Any:
    """A diffusers pipeline of a published architecture with random weights, in eval mode.

    without: parts to leave out, None in the pipeline. small: the same kinds of blocks at small
    widths, with a smaller vocabulary. Each part is filled where it is to live. Its weights depend
    on architecture and part alone, on the dtype up to rounding. The global random state stays.
    Raises UserError for an unknown architecture, or one of another pipeline class.
    """
    facts = load_architecture(architecture)
    if pipeline_class.__name__ != facts["pipeline"]:
        raise UserError(
            f"model.architecture={architecture} is a {facts['pipeline']}, not a "
            f"{pipeline_class.__name__}: choose the architecture of the model, or the model of the "
            "architecture."
        )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SMALL_NOISE if small else NOISE, generator=generator).to(device)
    parts: dict[str, Any] = dict.fromkeys(without)
    for name, facts_of_part in facts["parts"].items():
        if name not in without:
            with init_empty_weights(include_buffers=False):  # buffers are computed, not filled
                parts[name] = construct_part(facts_of_part, small=small)
            if isinstance(parts[name], nn.Module):
                _fill_module(parts[name], name, dtype, noise)
    return pipeline_class(**parts, **facts["arguments"])


def load_architecture(name: str) -> dict[str, Any]:
    """The published facts of an architecture: its pipeline's class, each part's configuration.

    {"pipeline", "arguments", "parts": {name: {"library", "class", "config", "small": what of the
    configuration differs at small widths}}}. Raises UserError if the name is unknown.
    """
    known = sorted(file.stem for file in ARCHITECTURES.glob("*.json"))
    one_of(known)("model.architecture", name)
    architecture: dict[str, Any] = json.loads((ARCHITECTURES / f"{name}.json").read_text())
    return architecture


def construct_part(part: Mapping[str, Any], *, small: bool = False) -> Any:
    """A module, tokenizer or scheduler as its library builds it, on torch's default device."""
    config = part["config"] | (part.get("small", {}) if small else {})
    if part["class"] == "CLIPTokenizer":
        return _clip_tokenizer(**config)
    if part["class"] == "T5TokenizerFast":
        return _t5_tokenizer(**config)
    part_class = getattr(LIBRARIES[part["library"]], part["class"])
    if part["library"] == "transformers":
        return part_class(part_class.config_class(**config))
    return part_class.from_config(config)


def _fill_module(module: Any, part: str, dtype: torch.dtype, noise: Tensor) -> None:
    """Gives an empty module its weights, on the device of the noise, (P,) float32.

    Matrices and convolutions are normal with variance 1 / fan-in, which keeps activations near unit
    size, in float16 too; biases are zero and the scales of norms one.
    """
    # As transformers loads it: T5's second feed-forward matrices overflow in float16.
    kept = getattr(module, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
    nn.Module.to(module, dtype)  # the floating buffers; the weights are still empty
    for name, empty in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight_dtype = torch.float32 if set(name.split(".")) & set(kept) else dtype
        weight = torch.empty(empty.shape, dtype=weight_dtype, device=noise.device)
        if weight.dim() > 1:
            start = zlib.crc32(f"{part}.{name}".encode()) % len(noise)
            _fill(weight, noise, start, weight[0].numel() ** -0.5)
        else:
            weight.fill_(0.0 if leaf == "bias" else 1.0)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight))
    nn.Module.to(module, noise.device)
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()  # T5's word vectors have two names
    module.eval()


def _fill(weight: Tensor, noise: Tensor, start: int, scale: float) -> None:
    """Writes the scaled noise (P,) into the weight, from place `start` on, round and round."""
    flat, done = weight.view(-1), 0
    while done < len(flat):
        piece = noise[start : start + len(flat) - done]
        torch.mul(piece, scale, out=flat[done : done + len(piece)])  # in float32, then rounded
        start, done = 0, done + len(piece)


def _clip_tokenizer(vocab_size: int, model_max_length: int, pad_token: str) -> Any:
    """In CLIP's order: the bytes, the bytes at a word's end, merged tokens, start and end last.

    So "!" is 0, and start and end are vocab_size - 2 and - 1, as published. There is no unknown
    character, because every text has bytes.
    """
    symbols = sorted(ByteLevel.alphabet())
    merges = merges_for(WORDS)
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols)]
    tokens += dict.fromkeys(first + second for first, second in merges)
    tokens += [f"<|unused_{i}|>" for i in range(vocab_size - 2 - len(tokens))]
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate([*tokens, START, END])},
        merges=merges,
        pad_token=pad_token,
        model_max_length=model_max_length,
    )


def _t5_tokenizer(vocab_size: int, model_max_length: int, extra_ids: int) -> Any:
    """In T5's order: padding, end and unknown, the tokens, and the extra ids downwards.

    Knows the printable ASCII characters; any other is unknown.
    """
    words = dict.fromkeys(SPACE + form for word in WORDS for form in (word, word.capitalize()))
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, SPACE: LETTER_SCORE}
    scores |= {chr(code): LETTER_SCORE for code in range(33, 127)}
    scores |= dict.fromkeys(words, WORD_SCORE)
    unused = vocab_size - extra_ids - len(scores)
    scores |= {f"<unused_{i}>": UNUSED_SCORE for i in range(unused)}
    scores |= {f"<extra_id_{i}>": 0.0 for i in reversed(range(extra_ids))}
    return transformers.T5TokenizerFast(
        vocab=list(scores.items()), model_max_length=model_max_length, extra_ids=extra_ids
    )


def merges_for(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding after which every word is one token.

    Each word is first cut up by the merges so far; those that join the rest come after them, and
    thus never before a merge that an earlier word needs.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + WORD_END]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            pair = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            i = pairs.index(pair)
            pieces[i : i + 2] = ["".join(pair)]
    return list(ranks)
