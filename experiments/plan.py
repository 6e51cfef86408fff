"""What the paper's tables and figures take, before any of it is paid: GPU hours, time, storage.

    python -m experiments.plan model=sd14 gpus=64      (make plan MODEL=sd14 GPUS=64)

Everything is counted from nothing, as if no run were done. Needs neither weights nor a GPU. What
runs share (unedited images, edits, scores) is made by the first that comes to it, and the others
wait for it, as they do (`cad.locks`); runs start with the unedited model's and go on with the one
that takes longest. conf/plan.yaml and conf/make.yaml have what is assumed.
"""

from __future__ import annotations

import heapq
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hydra
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from cad.errors import UserError
from experiments.command_line import USAGE_ERROR, exit_status
from experiments.composing import CONF, Compose, composer
from experiments.config import plain, register_resolvers, short_hash
from experiments.items.estimate import NO_EDIT, Work, attacked_prompts, needs, rates
from experiments.items.item import MINIATURE, Item
from experiments.items.overview import HOUR, in_words, kept
from experiments.items.plan import Overrides, Run, State, of_configuration
from experiments.make import KINDS, every_item
from experiments.mistakes import SHOWN, find_mistake
from experiments.rendering import DASH, show_table

NOT_SCORED = ("name", "_target_", "selection", "factor", "store", "values")  # of an edit: how it
# chooses from the scores, not what they are
GIGABYTE = 1000  # MB

log = logging.getLogger(__name__)
mistakes: list[str] = []  # of this process

register_resolvers()


@dataclass(frozen=True)
class Step:
    """A part of a run that is made once however many runs need it."""

    key: tuple[str, ...]
    seconds: float  # on one GPU
    megabytes: float  # that stay on disk
    called: str  # "30,000 images"


@dataclass(frozen=True)
class Job:
    """One run on one GPU: its steps, one after the other."""

    called: str  # "Table 2, edit=erase"
    run: frozenset[str]  # its overrides: what two items share is run once
    steps: tuple[Step, ...]
    start: float  # seconds to load and to measure
    unedited: bool

    @property
    def seconds(self) -> float:
        """Alone: nothing that it needs is there."""
        return self.start + sum(step.seconds for step in self.steps)


@dataclass(frozen=True)
class Outcome:
    """Of jobs on GPUs, all in seconds."""

    wall: float
    held: float  # GPU seconds from each job's start to its end
    worked: float  # of these, not spent waiting for what another job makes


@hydra.main(version_base="1.3", config_path="../conf", config_name="plan")
def main(config: DictConfig) -> None:
    """A user's mistake is told and noted here: out of a job Hydra would add words of its own."""
    try:
        program(config)
    except SHOWN as error:
        message = find_mistake(error)
        if message is None:
            raise
        log.error("%s", message)
        mistakes.append(message)


def program(config: DictConfig) -> None:
    """Print the plan of every item that the chosen model has, and of all together."""
    if not isinstance(config.gpus, int) or config.gpus < 1:
        raise UserError(f"gpus={config.gpus} is not allowed: it is a whole number, at least 1")
    model = str(config.model.name) if "model" in config else None
    with composer() as compose:
        settings = compose("make", [])
        items = list(chosen_items(compose, model))
        price = Prices(config, settings, [name for item in items for name in item.sweep.models])
        runs = ItemRuns(compose)
        found = [(item, jobs_of(item, runs, price)) for item in tqdm(items, leave=False)]
    lines = [line(item.called, item.sweep.models, jobs, config.gpus) for item, jobs in found]
    every = list({job.run: job for _, jobs in found for job in jobs}.values())
    lines.append(line("all, shared once", (), every, config.gpus))
    show_table(pd.DataFrame(lines), f"on {config.gpus} GPU{'s' if config.gpus > 1 else ''}")
    for note in notes(every, price, config.gpus):
        log.info("%s", note)


def chosen_items(compose: Compose, model: str | None) -> Iterator[Item]:
    """Those of conf/table and conf/figure that are made of the model; None: in the paper's."""
    for kind, how in KINDS.items():
        for name in every_item(kind):
            node = compose("make", [f"{kind}={name}"])[kind]
            if model in (None, MINIATURE, *node.models):
                yield how.read(node, model, False)


class ItemRuns:
    """Configurations of items' runs, as composing each would give, which takes 0.2 s.

    Runs that differ in values (ratio.value=0.01) or the concept alone are composed once: these are
    merged into what others share, which nothing but the resolvers of conf/ reads them from.
    """

    def __init__(self, compose: Compose) -> None:
        self._compose = compose
        self._composed: dict[Overrides, DictConfig] = {}

    def __call__(self, overrides: Iterable[str]) -> DictConfig:
        given = of_configuration(overrides)
        values = [each for each in given if _is_value(each)]
        concept = tuple(each for each in given if each.startswith("concept="))
        choices = tuple(each for each in given if each not in (*values, *concept))
        cfg = self._once(choices).copy()
        if concept:
            cfg.concepts = self._once(concept).concepts
        merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist(values))
        if not isinstance(merged, DictConfig):
            raise TypeError("a configuration is a mapping")
        return merged

    def _once(self, choices: Overrides) -> DictConfig:
        if choices not in self._composed:
            self._composed[choices] = self._compose("config", choices)
        return self._composed[choices]


class Prices:
    """What each step of a run takes, by conf/plan.yaml and conf/make.yaml."""

    def __init__(self, config: DictConfig, settings: DictConfig, models: Sequence[str]) -> None:
        self.counts: Mapping[str, int] = plain(settings.counts)
        self.seconds: Mapping[str, Any] = plain(config.seconds)
        self._sizes: Mapping[str, Any] = plain(config.megabytes)
        self._assumed = plain(settings.assumed)
        speed = rates([], settings.assumed, kept(config), Work(dict.fromkeys(models, 0), {}))
        given: dict[str, float] = plain(config.images_per_second)
        self.images = {**speed.images, **given}
        self.source = {
            name: "given" if name in given else "measured here" if measured else "assumed"
            for name, measured in ((name, name in speed.measured) for name in speed.images)
        }

    def made(self, cfg: DictConfig) -> list[Step]:
        """The steps of a run, in their order: scores, edit, images, ablations, attacks."""
        model, method = str(cfg.model.name), str(cfg.edit.name)
        steps = [] if method == NO_EDIT else self._edit(cfg, model, method)
        run = Run((), State.MISSING, "", cfg)
        fid = bool(cfg.evaluator) and "fid" in cfg.evaluator
        for key, count in needs(run, self.counts).items():
            if key[0] == "images":
                size = self._sizes["image"][model] + (self._sizes["features"] if fid else 0)
                seconds = count / self.images[model]
                steps.append(Step(key, seconds, count * size, f"{count:,} images"))
        return steps + self._looked_into(cfg, model)

    def _edit(self, cfg: DictConfig, model: str, method: str) -> list[Step]:
        seconds = float(self._assumed[model]["seconds_per_edit"][method])
        megabytes = float(self._sizes["edit"][method])
        concepts, adapter = list(cfg.concepts), plain(cfg.model.adapter)
        edit = plain(cfg.edit)
        own = (method, model, short_hash([edit, concepts, adapter]))
        if "attribution" not in cfg.edit:
            return [Step(own, seconds, megabytes, method)]
        scored = {key: value for key, value in edit.items() if key not in NOT_SCORED}
        scores = ("scores", model, short_hash([scored, concepts, adapter]))
        return [
            Step(scores, seconds, float(self._sizes["scores"][model]), "scores"),
            Step(own, 0.0, megabytes, method),
        ]

    def _looked_into(self, cfg: DictConfig, model: str) -> list[Step]:
        """Ablations of Figure 2 and attacks of Table 3."""
        steps = []
        of = [plain(cfg.edit), list(cfg.concepts), plain(cfg.model.adapter)]
        if cfg.effect.count:
            key = ("ablations", model, short_hash([*of, cfg.effect.count]))
            seconds = cfg.effect.count * float(self.seconds["ablation"][model])
            steps.append(Step(key, seconds, 0.0, f"{cfg.effect.count:,} ablations"))
        for name in cfg.attacks:
            count = attacked_prompts(cfg, self.counts) // len(cfg.attacks)
            key = ("attack", model, short_hash([*of, name, plain(cfg.prompts)]))
            seconds = count * float(self._assumed[model]["seconds_per_attacked_prompt"])
            megabytes = count * float(self._sizes["image"][model])
            steps.append(Step(key, seconds, megabytes, f"{count} prompts attacked"))
        return steps


def jobs_of(item: Item, runs: ItemRuns, price: Prices) -> list[Job]:
    """An item's runs, without those that it skips."""
    jobs = []
    several = [axis for axis, values in item.sweep.axes.items() if len(values) > 1]
    for place in item.sweep.places():
        if item.sweep.skipped(place) is None:
            overrides = item.sweep.overrides(place)
            cfg = runs(overrides)
            where = " ".join(f"{axis}={place[axis]}" for axis in several)
            jobs.append(
                Job(
                    called=f"{item.called}, {where or cfg.model.name}",
                    run=frozenset(overrides),
                    steps=tuple(price.made(cfg)),
                    start=float(price.seconds["run"]),
                    unedited=str(cfg.edit.name) == NO_EDIT,
                )
            )
    return jobs


def simulate(jobs: Sequence[Job], gpus: int) -> Outcome:
    """What becomes of jobs that start in order whenever a GPU is free, and share their steps."""
    ends: dict[tuple[str, ...], float] = {}  # of steps that were begun
    waiting = list(reversed(jobs))
    # When something happens on a GPU: its time, a tie-breaker, the job there, and its next step.
    events: list[tuple[float, int, Job | None, int]] = [(0.0, gpu, None, 0) for gpu in range(gpus)]
    held = worked = wall = 0.0
    while events:
        now, gpu, job, index = heapq.heappop(events)
        if job is None or index == len(job.steps):
            wall = max(wall, now)
            if waiting:
                job = waiting.pop()
                held, worked = held + job.start, worked + job.start
                heapq.heappush(events, (now + job.start, gpu, job, 0))
            continue
        step = job.steps[index]
        if step.key not in ends:
            ends[step.key] = now + step.seconds
            worked += step.seconds
        end = max(now, ends[step.key])
        held += end - now
        heapq.heappush(events, (end, gpu, job, index + 1))
    return Outcome(wall, held, worked)


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """The unedited model's first, which others wait for; then the longest first."""
    return sorted(jobs, key=lambda job: (not job.unedited, -job.seconds))


def distinct(jobs: Iterable[Job]) -> list[Step]:
    """What the jobs make, each once."""
    return list({step.key: step for job in jobs for step in job.steps}.values())


def line(called: str, models: Sequence[str], jobs: Sequence[Job], gpus: int) -> dict[str, str]:
    """A row of the plan."""
    outcome = simulate(in_order(jobs), gpus)
    steps = distinct(jobs)
    images = sum(int(s.called.split()[0].replace(",", "")) for s in steps if s.key[0] == "images")
    edits = sum(step.key[0] not in ("images", "scores", "ablations", "attack") for step in steps)
    return {
        "item": called,
        "of": ", ".join(models) or DASH,
        "runs": str(len(jobs)),
        "images": f"{images:,}",
        "edits": str(edits),
        "GPU hours": f"{outcome.worked / HOUR:,.1f}",
        "and waiting": f"{(outcome.held - outcome.worked) / HOUR:,.1f}",
        "time": in_words(outcome.wall),
        "GB": f"{sum(step.megabytes for step in steps) / GIGABYTE:,.1f}",
    }


def notes(jobs: Sequence[Job], price: Prices, gpus: int) -> list[str]:
    """Where the speeds come from, and what bounds the time however many GPUs there are."""
    speeds = [f"{m} {rate:g} ({price.source[m]})" for m, rate in price.images.items()]
    least = simulate(in_order(jobs), len(jobs)).wall
    longest = max(jobs, key=lambda job: job.seconds)
    parts = ", ".join(f"{s.called} {in_words(s.seconds)}" for s in longest.steps if s.seconds)
    return [
        f"Images a second: {', '.join(speeds)}. Seconds and sizes of the rest: conf/plan.yaml and "
        "conf/make.yaml, assumed.",
        f"All takes at least {in_words(least)}, with {len(jobs)} GPUs or more, a run each. The "
        f"longest run: {longest.called}: {parts}. Its steps follow each other; engine=ray, or "
        "shard=1/8 to 8/8, have its images made by many GPUs.",
        "Time is that of all launched at once, waiting included; one item after another takes the "
        f"sum of theirs{'' if gpus < len(jobs) else ', and more GPUs change nothing'}.",
    ]


def _is_value(override: str) -> bool:
    """Whether it sets a value, and neither chooses from a group nor adds a key."""
    key = override.partition("=")[0]
    return key[0] not in "+~" and "@" not in key and not (CONF / key).is_dir()


def command() -> int:
    """Exit status: 0, or 2 after a user's mistake."""
    return exit_status(main) or (USAGE_ERROR if mistakes else 0)


if __name__ == "__main__":
    sys.exit(command())
