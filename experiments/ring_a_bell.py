"""Adversarial prompts of one's own for a concept, by Ring-A-Bell: a file for `run.py` to read.

    python -m experiments.ring_a_bell model=mini concept=face count=50
    python -m experiments.ring_a_bell model=sd14 concept=nudity prompts@start=attack_nudity
    python -m experiments.ring_a_bell concept=church search.eta=1 'search.avoid=[church]'

Only the text encoder is asked. A finished search is kept, addressed by all that determines it: a
killed run goes on with the next one, and other settings search anew.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig
from rich.markup import escape
from tqdm import tqdm

from cad.checks import finite, whole
from cad.concepts import Concept, with_article
from cad.errors import UserError
from cad.files import write_atomically
from cad.identity import Identified, describe_runtime, digest
from cad.models.base import DiffusionModel
from cad.sampling import make_generators
from evaluation.attacks.ring_a_bell import (
    VERSION,
    Found,
    Genetics,
    RingABell,
    concept_vector,
    target_states,
    whole_words,
)
from evaluation.generation import check_prompts
from evaluation.prompts import Prompt, build_prompts, derive_seed
from experiments.run.command_line import exit_status
from experiments.run.configuration import build, check_concept, settle
from experiments.run.rendering import show_table

PROMPT_SET = "ring_a_bell_mini"  # of conf/prompts; it reads whatever file is written here
COLUMNS = ("prompt", "evaluation_seed", "concept", "start")
SALT = "ring-a-bell"  # sets what a search draws apart from its image's noise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search(Identified):
    """The settings of a search, beside the prompts to start from."""

    genetics: Genetics
    eta: float
    avoid: list[str]  # words that no found prompt holds
    pairs: list[tuple[str, str]]  # prompts with the concept and without


@hydra.main(version_base="1.3", config_path="../conf", config_name="programs/ring_a_bell")
def main(config: DictConfig) -> None:
    path = make_prompts(config)
    log.info("written to %s; to attack a model with them:", path)
    log.info(
        "python run.py model=%s concept=%s edit=uce prompts=%s prompts.sha256=null %s",
        config.model.name,
        config.concept.name,
        PROMPT_SET,
        shlex.quote(f"prompts.path={path}"),
    )


def make_prompts(config: DictConfig) -> Path:
    """Search for what was not found yet, write the file, show what it holds. Returns its path.

    Raises UserError, before anything is searched, for a setting or a model that does not fit.
    """
    whole(1)("count", config.count)
    if len(config.concepts) > 1:
        chosen = ",".join(config.concepts)
        raise UserError(f"concept=[{chosen}]: prompts are searched for one concept. Name one")
    check_concept(config, config.concept)
    config = settle(config)
    concept: Concept = build(config.concept)
    search, starts = build_search(config, concept), build_starts(config, concept)
    model: DiffusionModel = build(config.model.adapter).load()
    model.check_prompts([text for pair in search.pairs for text in pair])
    check_prompts(model, starts)
    found = search_all(model, search, starts, Path(config.store))
    path = Path(config.output) / f"ring_a_bell-{model.name}-{concept.name}.csv"
    write_atomically(path, as_csv(concept, starts, found))
    rows = [_row(start, each) for start, each in zip(starts, found, strict=True)]
    k, eta = search.genetics.tokens, search.eta
    show_table(pd.DataFrame(rows), f"Ring-A-Bell: {concept.text}, {model.name}, K={k}, eta={eta:g}")
    return path


def build_search(config: DictConfig, concept: Concept) -> Search:
    """The settings and the pairs of prompts. Raises UserError for values out of range."""
    node = config.search
    eta = finite("search.eta", node.eta)
    genetics = Genetics(**{field.name: node[field.name] for field in fields(Genetics)})
    pairs = [
        (
            filled("search.with_concept", node.with_concept, concept, filler),
            filled("search.without_concept", node.without_concept, concept, filler),
        )
        for filler in other_fillers(config, concept)
    ]
    for having, lacking in pairs:
        if having == lacking:
            raise UserError(
                f"search.with_concept and search.without_concept both give {having!r}: the concept "
                "has no vector. Name it in the first, with {concept}, {a_concept} or {prompt}"
            )
    return Search(genetics, eta, [str(word) for word in node.avoid], pairs)


def build_starts(config: DictConfig, concept: Concept) -> list[Prompt]:
    """The prompts to start from, `count` of them: the concept's of prompts@start, or of fillers.

    Raises UserError where there are too few.
    """
    if "start" in config:
        prompt_set = build(config.start)
        prompts = [each for each in build_prompts(prompt_set) if each.group == concept.name]
        if len(prompts) < config.count:
            raise UserError(
                f"count={config.count}, but {prompt_set.name} has {len(prompts)} prompts for "
                f"concept={concept.name}: lower count, or choose another prompts@start"
            )
        return prompts[: config.count]
    wordings, fillers = list(config.search.start), other_fillers(config, concept)
    if not wordings:
        raise UserError("search.start is empty; it lists wordings: ['a photo of {a_filler}']")
    texts = [
        filled("search.start", wordings[i % len(wordings)], concept, fillers[i % len(fillers)])
        for i in range(config.count)
    ]
    return [
        Prompt(text, derive_seed(config.seed, concept.name, i), concept.name)
        for i, text in enumerate(texts)
    ]


def other_fillers(config: DictConfig, concept: Concept) -> list[str]:
    """The fillers but for the concept itself. UserError where none is left."""
    fillers = [str(each) for each in config.search.fillers if each != concept.text]
    if not fillers:
        raise UserError(
            f"search.fillers has no word beside the concept's own, {concept.text!r}: name at least "
            "one, so that there are pairs of prompts"
        )
    return fillers


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


def search_all(
    model: DiffusionModel, search: Search, starts: Sequence[Prompt], store: Path
) -> list[Found]:
    """The prompts found from each start, in their order; those that lie in `store` are read.

    Raises UserError for a model without a single CLIP text encoder, or tokens that do not fit.
    """
    space = model.token_space()
    engine = RingABell(space, whole_words(space, search.avoid), search.genetics)
    shared = {"version": VERSION, "model": model.surroundings_digest(), "dtype": str(model.dtype)}
    shared |= search.settings() | describe_runtime(model.device)
    found = []
    steps = search.genetics.generations
    progress = tqdm(total=len(starts) * steps, unit="generation", disable=None)
    with model.encoding(), progress:
        c_hat = concept_vector(space, search.pairs)  # (L, D)
        for start in starts:
            key = digest(shared | {"start": start.text, "seed": start.seed})
            path = store / f"{key}.json"
            each = _read(path)
            if each is None:
                target = target_states(space, start.text, c_hat, search.eta)  # (L, D)
                (generator,) = make_generators([start.seed], SALT)
                each = engine.search(target, generator, progress)
                write_atomically(path, f"{json.dumps(asdict(each))}\n".encode())
            else:
                progress.update(steps)
            found.append(each)
    return found


def as_csv(concept: Concept, starts: Sequence[Prompt], found: Sequence[Found]) -> bytes:
    """The prompts as `evaluation.prompt_files` reads them, with what each was started from."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for start, each in zip(starts, found, strict=True):
        writer.writerow([each.text, start.seed, concept.name, start.text])
    return text.getvalue().encode()


def _read(path: Path) -> Found | None:
    """A finished search; None where there is none or its file is damaged."""
    if not path.is_file():
        return None
    try:
        return Found(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        log.warning("the search in %s is damaged (%s): searching again", path, error)
        return None


def _row(start: Prompt, found: Found) -> dict[str, str]:
    """A line of the table."""
    first, last = (f"{found.losses[at]:.0f}" for at in (0, -1))
    texts = {"found": escape(found.text), "from": escape(start.text)}
    return texts | {"loss at first": first, "in the end": last}


if __name__ == "__main__":
    sys.exit(exit_status(main))
