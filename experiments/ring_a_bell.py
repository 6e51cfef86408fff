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
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import hydra
import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.markup import escape
from tqdm import tqdm

from cad.concepts import Concept, with_article
from cad.digests import settings_digest
from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.runtime import describe_runtime
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
from evaluation.files import write_atomically
from evaluation.generation import check_prompts
from evaluation.prompts import Prompt, build_prompts, derive_seed
from experiments.command_line import exit_status
from experiments.config import register_resolvers, settle
from experiments.experiment import quiet_libraries
from experiments.rendering import show_table

PROMPT_SET = "ring_a_bell_mini"  # of conf/prompts; it reads whatever file is written here
COLUMNS = ("prompt", "evaluation_seed", "concept", "start")
SALT = "ring-a-bell"  # sets what a search draws apart from its image's noise

log = logging.getLogger(__name__)

register_resolvers()


@dataclass(frozen=True)
class Search:
    """What is looked for, beside the prompts to start from; JSON-able by `asdict`."""

    genetics: Genetics
    eta: float
    avoid: list[str]  # words that no found prompt holds
    pairs: list[tuple[str, str]]  # prompts with the concept and without


@hydra.main(version_base="1.3", config_path="../conf", config_name="ring_a_bell")
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
    quiet_libraries()
    check(config)
    config = settle(config)
    concept: Concept = instantiate(config.concept)
    search, starts = build_search(config, concept), build_starts(config, concept)
    model: DiffusionModel = instantiate(config.model.adapter, _convert_="all")
    model.check_prompts([text for pair in search.pairs for text in pair])
    check_prompts(model, starts)
    found = search_all(model, search, starts, Path(config.store))
    path = Path(config.output) / f"ring_a_bell-{model.name}-{concept.name}.csv"
    write_atomically(path, as_csv(concept, starts, found))
    rows = [_row(start, each) for start, each in zip(starts, found, strict=True)]
    k, eta = search.genetics.tokens, search.eta
    show_table(pd.DataFrame(rows), f"Ring-A-Bell: {concept.text}, {model.name}, K={k}, eta={eta:g}")
    return path


def check(config: DictConfig) -> None:
    """Raise UserError for a count, concepts or a model that cannot work."""
    if isinstance(config.count, bool) or not isinstance(config.count, int) or config.count < 1:
        raise UserError(f"count={config.count} is not allowed; it is a whole number, at least 1")
    if len(config.concepts) > 1:
        chosen = ",".join(config.concepts)
        raise UserError(f"concept=[{chosen}]: prompts are searched for one concept. Name one")
    known = config.model.concepts
    if known is not None and config.concept.name not in known:
        raise UserError(
            f"concept={config.concept.name} is unknown to model={config.model.name}, which draws: "
            f"{', '.join(known)}. Choose one of these, or another model"
        )


def build_search(config: DictConfig, concept: Concept) -> Search:
    """The settings and the pairs of prompts. Raises UserError for values out of range."""
    node = config.search
    known = isinstance(node.eta, int | float) and not isinstance(node.eta, bool)
    if not (known and math.isfinite(node.eta)):
        raise UserError(f"search.eta={node.eta} is not allowed; it is a finite number")
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
    return Search(genetics, float(node.eta), [str(word) for word in node.avoid], pairs)


def build_starts(config: DictConfig, concept: Concept) -> list[Prompt]:
    """The prompts to start from, `count` of them: those of prompts@start, or made of fillers.

    Of a prompt set the concept's group is taken. Raises UserError where there are too few.
    """
    if "start" in config:
        prompt_set = instantiate(config.start, _convert_="all")
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
    """What is found from each start, in their order; what lies in `store` is read.

    Raises UserError for a model without a single CLIP text encoder, or tokens that do not fit.
    """
    space = model.token_space()
    engine = RingABell(space, whole_words(space, search.avoid), search.genetics)
    shared = {"version": VERSION, "model": model.surroundings_digest(), "dtype": str(model.dtype)}
    shared |= asdict(search) | describe_runtime(model.device)
    found = []
    steps = search.genetics.generations
    progress = tqdm(total=len(starts) * steps, unit="generation", disable=None)
    with model.encoding(), progress:
        c_hat = concept_vector(space, search.pairs)  # (L, D)
        for start in starts:
            key = settings_digest(shared | {"start": start.text, "seed": start.seed})
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
