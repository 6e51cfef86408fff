"""What making the missing runs takes: images that are not there yet, edits, and about how long.

An image set counts once however many runs need it, and not at all if a finished run has it. Seconds
come of what was measured here, of edits in their results, of images by `note_throughput`; where
nothing was, of what conf/make.yaml assumes.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from evaluation.engines.local import LocalEngine
from evaluation.evaluators.base import CONCEPT, Evaluator
from experiments.config import plain, short_hash
from experiments.items.plan import Run, State
from experiments.results import read_json, write_json

THROUGHPUT = "throughput.json"
FEWEST = 100  # images that a throughput is measured on
NO_EDIT = "none"


@dataclass(frozen=True)
class Work:
    """What is to be made: images by model, edits by (model, method), attacked prompts by model."""

    images: Mapping[str, int]
    edits: Mapping[tuple[str, str], int]
    attacked: Mapping[str, int] = field(default_factory=dict)  # each attack's count

    @property
    def total_images(self) -> int:
        return sum(self.images.values())


@dataclass(frozen=True)
class Rates:
    """Images a second and seconds an attacked prompt by model, an edit by (model, method)."""

    images: Mapping[str, float]
    edits: Mapping[tuple[str, str], float]
    attacked: Mapping[str, float]
    measured: frozenset[str]  # models whose images were; the others are assumed

    def seconds(self, work: Work) -> float:
        """An estimate, without what starting and measuring take."""
        making = sum(count / self.images[model] for model, count in work.images.items())
        making += sum(count * self.edits[key] for key, count in work.edits.items())
        return making + sum(count * self.attacked[model] for model, count in work.attacked.items())


def missing_work(runs: Sequence[Run], chosen: Sequence[Run], counts: Mapping[str, int]) -> Work:
    """What the missing ones of `chosen` make that no finished one of `runs` has made.

    `counts` are the images of published prompt sets, whose files need not be here.
    """
    made = {key for run in runs if run.state == State.DONE for key in needs(run, counts)}
    missing = [run for run in chosen if run.state == State.MISSING]
    wanted: dict[tuple[str, str, str], int] = {}
    attacked: dict[str, int] = {}
    for run in missing:
        wanted |= needs(run, counts)
        if run.cfg is not None and run.cfg.attacks:
            model = str(run.cfg.model.name)
            attacked[model] = attacked.get(model, 0) + attacked_prompts(run.cfg, counts)
    images: dict[str, int] = {}
    edits: dict[tuple[str, str], int] = {}
    for (kind, model, key), count in wanted.items():
        if (kind, model, key) in made:
            continue
        if kind == "images":
            images[model] = images.get(model, 0) + count
        else:
            edits[model, kind] = edits.get((model, kind), 0) + 1
    return Work(images, edits, attacked)


def rates(runs: Sequence[Run], assumed: Mapping[str, Any], folder: Path, work: Work) -> Rates:
    """How fast the work's models and methods are, measured before or assumed."""
    measured = read_json(folder / THROUGHPUT) if (folder / THROUGHPUT).exists() else {}
    images = {model: float(assumed[model]["images_per_second"]) for model in work.images}
    images |= {model: float(measured[model]) for model in work.images if model in measured}
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.state == State.DONE and run.cfg is not None:
            key = (str(run.cfg.model.name), str(run.cfg.edit.name))
            seconds.setdefault(key, []).append(read_json(run.folder / "cost.json")["seconds"])
    edits = {
        (model, method): statistics.median(seconds[model, method])
        if (model, method) in seconds
        else float(assumed[model]["seconds_per_edit"][method])
        for model, method in work.edits
    }
    attacked = {
        model: float(assumed[model]["seconds_per_attacked_prompt"]) for model in work.attacked
    }
    return Rates(images, edits, attacked, frozenset(images.keys() & measured.keys()))


def is_on_one_device(run: Run) -> bool:
    """Whether its images are made on one device of this machine, so that its speed is that's."""
    cfg = run.cfg
    if cfg is None or get_class(cfg.engine._target_) is not LocalEngine:
        return False
    return len(LocalEngine(cfg.engine.device, cfg.engine.processes).devices()) == 1


def note_throughput(folder: Path, model: str, images: int, seconds: float) -> None:
    """Remember how many images a second a model's runs made here, all in all, if it was enough."""
    if images < FEWEST or seconds <= 0:
        return
    path = folder / THROUGHPUT
    known = read_json(path) if path.exists() else {}
    write_json(path, known | {model: round(images / seconds, 3)})


def needs(run: Run, counts: Mapping[str, int]) -> dict[tuple[str, str, str], int]:
    """Image sets ("images", model, key) with their sizes, and the edit (method, model, key)."""
    if run.cfg is None:
        return {}
    cfg, model, method = run.cfg, str(run.cfg.model.name), str(run.cfg.edit.name)
    concepts = list(cfg.concepts)
    edit = short_hash([plain(cfg.edit), concepts, plain(cfg.model.adapter), cfg.dtype])
    sets: dict[tuple[str, str, str], int] = {}
    for measured in _measured(cfg):
        node = cfg.prompts if measured == CONCEPT else cfg.model.prompts.general
        if node is None:
            continue  # the run will say so
        count = count_images(node, counts)
        size = count if cfg.limit is None else min(count, cfg.limit)
        chosen = None if cfg.limit is None else [cfg.limit, concepts]
        images = [plain(node), chosen, plain(cfg.model.sampler), plain(cfg.model.adapter)]
        sets["images", model, short_hash([*images, NO_EDIT])] = size
        if method != NO_EDIT:
            sets["images", model, short_hash([*images, edit])] = size
    return sets if method == NO_EDIT else sets | {(method, model, edit): 1}


def attacked_prompts(cfg: DictConfig, counts: Mapping[str, int]) -> int:
    """How many prompts a run attacks at most, each attack's counted."""
    count = 0 if cfg.prompts is None else count_images(cfg.prompts, counts)
    each = count if cfg.attack.limit is None else min(count, cfg.attack.limit * len(cfg.concepts))
    return each * len(cfg.attacks)


def _measured(cfg: DictConfig) -> list[str]:
    """The kinds of prompts that the run's evaluators look at."""
    targets = [str(node._target_) for node in cfg.evaluator.values()] if cfg.evaluator else []
    return list(dict.fromkeys(_measures(target) for target in targets))


@functools.cache
def _measures(target: str) -> str:
    evaluator: type[Evaluator] = get_class(target)
    return evaluator.measures


def count_images(node: DictConfig, counts: Mapping[str, int]) -> int:
    """How many images a prompt set asks for."""
    name = str(node.name) if "name" in node else ""
    return counts[name] if name in counts else len(instantiate(node, _convert_="all").build())
