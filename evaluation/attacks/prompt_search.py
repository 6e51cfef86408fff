"""Ring-A-Bell from many prompts; each find is kept on disk: a killed run goes on with the next.

A find's file (`cad.store`) is addressed by all that determines it: the text encoder, the search's
settings, device and libraries, the prompt to start from and its seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cad.concepts import Concept, with_article
from cad.errors import UserError
from cad.identity import Identified, describe_runtime
from cad.models.base import DiffusionModel
from cad.sampling import make_generators
from cad.store import Notes, Store, read_tensors, write_tensors
from evaluation.attacks.ring_a_bell import (
    VERSION,
    Found,
    Genetics,
    RingABell,
    concept_vector,
    target_states,
    whole_words,
)
from evaluation.prompts import Prompt

FORMAT = "cad-prompt/1"
SALT = "ring-a-bell"  # sets what a search draws apart from its image's noise


@dataclass(frozen=True)
class PromptSearch(Identified):
    """The settings of a search, beside the prompts to start from."""

    genetics: Genetics
    eta: float
    avoid: list[str]  # words that no found prompt holds
    pairs: list[tuple[str, str]]  # prompts with the concept and without

    def find(self, model: DiffusionModel, starts: Sequence[Prompt], store: Store) -> list[Found]:
        """The prompts found from each start, in their order; those that lie in `store` are read.

        Raises UserError for a model without a single CLIP text encoder, or tokens that do not fit.
        """
        space = model.token_space()
        engine = RingABell(space, whole_words(space, self.avoid), self.genetics)
        shared = {"version": VERSION, "model": model.surroundings_digest()}
        shared |= {"dtype": str(model.dtype), **self.settings(), **describe_runtime(model.device)}
        found: list[Found] = []
        steps = self.genetics.generations
        progress = tqdm(total=len(starts) * steps, unit="generation", disable=None)
        with model.encoding(), progress:
            c_hat = concept_vector(space, self.pairs)  # (L, D)
            for start in starts:

                def make(start: Prompt = start) -> Found:
                    target = target_states(space, start.text, c_hat, self.eta)  # (L, D)
                    (generator,) = make_generators([start.seed], SALT)
                    return engine.search(target, generator, progress)

                key = shared | {"start": start.text, "seed": start.seed}
                found.append(store.get_or_make(key, "the search", _read, make, _write)[0])
                progress.update(len(found) * steps - progress.n)  # by what was read
        return found


def concept_pairs(
    having: str, lacking: str, concept: Concept, fillers: Iterable[str]
) -> list[tuple[str, str]]:
    """A prompt with the concept and one without, for each filler, of these two wordings.

    Raises UserError where both are the same: such pairs have no difference.
    """
    keys = {"search.with_concept": having, "search.without_concept": lacking}
    pairs = []
    for filler in fillers:
        one, other = (filled(key, wording, concept, filler) for key, wording in keys.items())
        if one == other:
            raise UserError(
                f"{' and '.join(keys)} both give {one!r}: the concept has no vector. Name it in "
                "the first, with {concept}, {a_concept} or {prompt}"
            )
        pairs.append((one, other))
    return pairs


def other_fillers(fillers: Iterable[str], concept: Concept) -> list[str]:
    """The fillers but for the concept itself. UserError where none is left."""
    others = [str(each) for each in fillers if each != concept.text]
    if not others:
        raise UserError(
            f"search.fillers has no word beside the concept's own, {concept.text!r}: name at least "
            "one, so that there are pairs of prompts"
        )
    return others


def filled(key: str, wording: str, concept: Concept, filler: str) -> str:
    """A wording with its fields filled in. UserError for a field that there is not."""
    values = {
        "concept": concept.text,
        "a_concept": with_article(concept.text),
        "prompt": concept.prompt,
        "filler": filler,
        "a_filler": with_article(filler),
    }
    try:
        return wording.format(**values)
    except (LookupError, ValueError) as error:
        allowed = ", ".join(f"{{{name}}}" for name in values)
        raise UserError(f"{key}={wording!r} is not allowed; its fields are {allowed}") from error


def _write(path: Path, found: Found) -> Notes:
    header = {"text": found.text, "losses": found.losses}
    write_tensors(path, {"tokens": torch.tensor(found.tokens)}, header, FORMAT)
    return {}


def _read(path: Path, _notes: Notes) -> Found:
    header, tensors = read_tensors(path, FORMAT)
    return Found(header["text"], tensors["tokens"].tolist(), header["losses"])
