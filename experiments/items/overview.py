"""What an item's plan looks like: its runs one by one, in a line, and all items at a glance."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments.items.estimate import Work, missing_work, rates
from experiments.items.item import MINIATURE, Item, Place, parse_filter
from experiments.items.launch import is_for_gpus_elsewhere
from experiments.items.plan import Run, State, find_runs
from experiments.items.preflight import lacking
from experiments.rendering import DASH, show_table

MINUTE, HOUR = 60, 3600  # seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """An item's runs, and those of them that the filter chooses."""

    item: Item
    runs: tuple[tuple[Place, Run], ...]
    chosen: tuple[tuple[Place, Run], ...]

    @property
    def all(self) -> list[Run]:
        return [run for _, run in self.runs]

    def looked_up(self) -> Plan:
        """The plan as it is on disk now."""
        runs, chosen = (
            tuple((place, run.looked_up()) for place, run in pairs)
            for pairs in (self.runs, self.chosen)
        )
        return Plan(self.item, runs, chosen)

    @property
    def wanted(self) -> list[Run]:
        return [run for _, run in self.chosen]

    def missing(self) -> list[Run]:
        """What is to be run, each once."""
        runs = {run.overrides: run for run in self.wanted if run.state == State.MISSING}
        return list(runs.values())


def plan_item(config: DictConfig, item: Item, passed: Sequence[str], *, whole: bool = True) -> Plan:
    """An item's runs: the `whole` of them, or those that the filter chooses alone.

    UserError for a filter that names what the item has not.
    """
    sweep = item.sweep
    wanted = parse_filter(config.filter, sweep.axes)
    asked = [all(place[axis] in kept for axis, kept in wanted.items()) for place in sweep.places()]
    places = [place for place, ask in zip(sweep.places(), asked, strict=True) if whole or ask]
    more = [*shlex.split(config.overrides), *passed]
    overrides = [sweep.overrides(place, more) for place in places]
    reasons = [sweep.skipped(place) for place in places]
    pairs = list(zip(places, overrides, reasons, strict=True))
    possible = [each for _, each, reason in pairs if reason is None]
    found = find_runs(possible, for_gpu=is_for_gpus_elsewhere(item, config))
    runs = [
        (place, found[each] if reason is None else Run(each, State.REFUSED, reason))
        for place, each, reason in pairs
    ]
    if whole:
        chosen = [pair for pair, ask in zip(runs, asked, strict=True) if ask]
        return Plan(item, tuple(runs), tuple(chosen))
    return Plan(item, tuple(runs), tuple(runs))


def show_plan(config: DictConfig, plan: Plan) -> None:
    """Print what is done, missing and refused, and what making the rest takes."""
    several = [axis for axis, values in plan.item.sweep.axes.items() if len(values) > 1]
    rows = [
        {"run": " ".join(f"{k}={v}" for k, v in place.items() if k in several)}
        | {"state": run.state.value, "because": run.reason}
        for place, run in plan.chosen
    ]
    caption = f"{plan.item.title}\n{summary(config, plan)}"
    frame = pd.DataFrame(rows)
    show_table(frame if any(frame["because"]) else frame.drop(columns="because"), caption)
    models = {str(run.cfg.model.name): run.cfg for run in plan.missing() if run.cfg is not None}
    gpu = not is_for_gpus_elsewhere(plan.item, config)
    for name, cfg in models.items():
        for what in () if name == MINIATURE else lacking(cfg, gpu=gpu):
            log.warning("model=%s: %s", name, what)


def summary(config: DictConfig, plan: Plan) -> str:
    """A line: how many runs are done, missing, refused; images to make, and about how long."""
    counts = _counts(plan)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    work, seconds, known = _estimate(config, plan)
    if not (work.images or work.edits or work.attacked):
        return f"{len(plan.chosen)} runs: {states}; no images to make"
    attacked = f" and {sum(work.attacked.values()):,} prompts to attack" if work.attacked else ""
    return (
        f"{len(plan.chosen)} runs: {states}; {work.total_images:,} images and "
        f"{sum(work.edits.values())} edits to make{attacked}, about {in_words(seconds)} at a speed "
        f"that is {known}"
    )


def status_line(config: DictConfig, plan: Plan) -> dict[str, str]:
    """An item's line of the overview."""
    work, seconds, _ = _estimate(config, plan)
    rendered = Path(config.output) / f"{plan.item.name}.md"
    return {
        "item": plan.item.called,
        "of": ", ".join(plan.item.sweep.models),
        "runs": str(len(plan.chosen)),
        **{state: str(count) for state, count in _counts(plan).items()},
        "images to make": f"{work.total_images:,}",
        "about": in_words(seconds) if work.images or work.edits else DASH,
        "rendered": rendered.name if rendered.exists() else DASH,
    }


def in_words(seconds: float) -> str:
    """ "35 s", "12 min", "3.5 h"."""
    if seconds < MINUTE:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / MINUTE:.0f} min" if seconds < HOUR else f"{seconds / HOUR:,.1f} h"


def _counts(plan: Plan) -> Mapping[str, int]:
    states = [run.state for run in plan.wanted]
    return {state.value: states.count(state) for state in State}


def _estimate(config: DictConfig, plan: Plan) -> tuple[Work, float, str]:
    work = missing_work(plan.all, plan.wanted, config.counts)
    speed = rates(plan.all, config.assumed, kept(config), work)
    measured = speed.measured >= work.images.keys() and bool(work.images)
    return work, speed.seconds(work), "measured here" if measured else "assumed"


def kept(config: DictConfig) -> Path:
    """Folder of what is this machine's: measured speed, W&B's files."""
    return Path(config.paths.results) / "reproduction"
