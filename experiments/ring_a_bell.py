"""Adversarial prompts of one's own for a concept, by Ring-A-Bell: a file for `run.py` to read.

    python -m experiments.ring_a_bell model=mini concept=face count=50
    python -m experiments.ring_a_bell model=sd14 concept=nudity prompts@start=attack_nudity
    python -m experiments.ring_a_bell concept=church search.eta=1 'search.avoid=[church]'

Only the text encoder is asked. A finished search is kept, addressed by all that determines it: a
killed run goes on with the next one, and other settings search anew.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import fields
from itertools import cycle, islice
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig
from rich.markup import escape

from cad.checks import finite, seed, text, texts, whole
from cad.concepts import Concept
from cad.errors import UserError
from cad.files import write_atomically
from cad.models.base import DiffusionModel
from cad.store import Store
from evaluation.attacks.prompt_search import (
    PromptSearch,
    concept_pairs,
    filled,
    other_fillers,
)
from evaluation.attacks.ring_a_bell import Genetics
from evaluation.generation import check_prompts
from evaluation.prompts import Prompt, build_prompts, derive_seed
from experiments.run.arguments import build
from experiments.run.command_line import exit_status
from experiments.run.configuration import check_concept, settle
from experiments.run.rendering import show_table

PROMPT_SET = "ring_a_bell_mini"  # of conf/prompts; it reads whatever file is written here

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="programs/ring_a_bell")
def main(config: DictConfig) -> None:
    path = make_prompts(config)
    chosen = f"model={config.model.name} concept={config.concept.name} prompts={PROMPT_SET}"
    place = shlex.quote(f"prompts.path={path}")
    log.info("written to %s; to attack a model with them:", path)
    log.info("python run.py %s edit=uce prompts.sha256=null %s", chosen, place)


def make_prompts(config: DictConfig) -> Path:
    """Search for what was not found yet, write the file, show what it holds. Returns its path.

    Raises UserError, before anything is searched, for a setting or a model that does not fit.
    """
    whole(1)("count", config.count)
    seed("seed", config.seed)
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
    found = search.find(model, starts, Store(config.store))
    frame = pd.DataFrame(  # as `evaluation.prompt_files` reads it
        {
            "prompt": [each.text for each in found],
            "evaluation_seed": [start.seed for start in starts],
            "concept": concept.name,
            "start": [start.text for start in starts],
        }
    )
    path = Path(config.output) / f"ring_a_bell-{model.name}-{concept.name}.csv"
    write_atomically(path, frame.to_csv(index=False).encode())
    shown = frame[["prompt", "start"]].map(escape)
    shown["loss at first"] = [f"{each.losses[0]:.0f}" for each in found]
    shown["in the end"] = [f"{each.losses[-1]:.0f}" for each in found]
    k, eta = search.genetics.tokens, search.eta
    show_table(shown, f"Ring-A-Bell: {concept.text}, {model.name}, K={k}, eta={eta:g}")
    return path


def build_search(config: DictConfig, concept: Concept) -> PromptSearch:
    """The settings and the pairs of prompts. Raises UserError for values out of range."""
    node = config.search
    eta = finite("search.eta", node.eta)
    genetics = Genetics(**{field.name: node[field.name] for field in fields(Genetics)})
    fillers = other_fillers(texts("search.fillers", node.fillers), concept)
    having, lacking = (text(f"search.{k}", node[k]) for k in ("with_concept", "without_concept"))
    pairs = concept_pairs(having, lacking, concept, fillers)
    return PromptSearch(genetics, eta, [*texts("search.avoid", node.avoid)], pairs)


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
    wordings = texts("search.start", config.search.start)
    fillers = other_fillers(config.search.fillers, concept)
    if not wordings:
        raise UserError("search.start is empty; it lists wordings: ['a photo of {a_filler}']")
    in_turn = islice(zip(cycle(wordings), cycle(fillers), strict=False), config.count)
    chosen = [filled("search.start", wording, concept, filler) for wording, filler in in_turn]
    return [
        Prompt(text, derive_seed(config.seed, concept.name, i), concept.name)
        for i, text in enumerate(chosen)
    ]


if __name__ == "__main__":
    sys.exit(exit_status(main))
