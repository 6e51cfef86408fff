"""Make the paper's tables and figures: find which runs are missing, run them, render.

    python -m experiments.make table=table01 model=mini            (make table1 MODEL=mini)
    python -m experiments.make table=table01 model=mini dry=true   the plan alone
    python -m experiments.make figure=figure7 model=mini           (make figure7 MODEL=mini)
    python -m experiments.make status=true model=mini              all of them at a glance

Interrupt and repeat as you like: what is done is never run again. conf/make.yaml has the settings,
conf/table and conf/figure the items.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cad.errors import UserError
from experiments.command_line import USAGE_ERROR, exit_status
from experiments.composing import CONF, composer
from experiments.config import register_resolvers
from experiments.figures.figure import read_figure
from experiments.figures.making import make_figure
from experiments.items.estimate import (
    Work,
    is_on_one_device,
    missing_work,
    note_throughput,
    rates,
)
from experiments.items.item import MINIATURE, MODEL, Item
from experiments.items.launch import blocks, is_for_gpus_elsewhere, launch
from experiments.items.overview import Plan, kept, plan_item, show_plan, status_line, summary
from experiments.items.plan import Overrides, of_configuration
from experiments.items.preflight import check_machine
from experiments.items.publishing import Rendered, publish, show
from experiments.mistakes import SHOWN, find_mistake
from experiments.rendering import show_table
from experiments.tables.making import make_table
from experiments.tables.table import read_table
from experiments.tracking import Tracker

INTERRUPTED = 130  # exit status
PASSED_ON = ("paths.", "logger")  # overrides of this program that runs are given too

log = logging.getLogger(__name__)
mistakes: list[str] = []  # of this process

register_resolvers()


@dataclass(frozen=True)
class Kind:
    """Tables, or figures: how one is read, and how it is made of its runs' results."""

    read: Callable[[DictConfig, str | None, bool], Item]
    make: Callable[[DictConfig, Any, Plan, Mapping[Overrides, str]], Rendered]


KINDS = {  # by the configuration group
    "table": Kind(read_table, make_table),
    "figure": Kind(read_figure, make_figure),
}


@hydra.main(version_base="1.3", config_path="../conf", config_name="make")
def main(config: DictConfig) -> None:
    """A user's mistake is told and noted here: out of a job Hydra would add words of its own."""
    given = list(HydraConfig.get().overrides.task)
    passed = [each for each in given if each.startswith(PASSED_ON)]
    try:
        program(config, given, passed)
    except SHOWN as error:
        message = find_mistake(error)
        if message is None:
            raise
        log.error("%s", message)
        mistakes.append(message)


def program(config: DictConfig, given: Sequence[str], passed: Sequence[str]) -> None:
    """Everything that was asked for. UserError, after the others, for items that cannot be made.

    `given` are this program's overrides, of which runs are `passed` some.
    """
    everything = not any(kind in config for kind in KINDS)
    model = str(config.model.name) if "model" in config else None
    refused, lines = [], []
    for kind, name, node in _chosen(config, given):
        if everything and model not in (None, MINIATURE, *node.models):
            log.info("%s is of %s alone", name, ", ".join(node.models))
            continue
        try:
            item = KINDS[kind].read(node, model, config.fast)
            if config.status:
                lines.append(status_line(config, plan_item(config, item, passed, whole=False)))
            elif config.dry:
                show_plan(config, plan_item(config, item, passed, whole=False))
            else:
                make_item(config, kind, item, passed)
        except SHOWN as error:
            message = find_mistake(error)
            if message is None or not everything:
                raise
            log.error("%s: %s", name, message)
            refused.append(name)
    if config.status:
        show_table(pd.DataFrame(lines), "tables and figures")
    if refused:
        raise UserError(f"not made, for the reasons above: {', '.join(refused)}")


def every_item(kind: str) -> list[str]:
    """The items of conf/table or conf/figure, in order."""
    return sorted(path.stem for path in (CONF / kind).glob("*.yaml"))


def make_item(config: DictConfig, kind: str, item: Item, passed: Sequence[str]) -> dict[str, Path]:
    """Run what is missing and render what there is. Returns the files by ending."""
    if not (config.render or item.sweep.is_miniature):
        check_models(config, item, passed)
    plan = plan_item(config, item, passed)
    log.info("%s\n%s", item.title, summary(config, plan))
    failed = {} if config.render else run_missing(config, plan)
    plan = plan.looked_up()
    rendered = KINDS[kind].make(config, item, plan, failed)
    show(item, rendered)
    paths = publish(item, rendered, plan.all, Path(config.output))
    for path in paths.values():
        log.info("%s", path)
    tracker: Tracker = hydra.utils.instantiate(config.logger)
    tracker.log_item(item.name, rendered.panels, rendered.notes, paths, kept(config))
    return paths


def check_models(config: DictConfig, item: Item, passed: Sequence[str]) -> None:
    """Raise UserError where a model's runs cannot be made here; composes one run of each model."""
    sweep = item.sweep
    with composer() as compose:
        first = {place[MODEL]: place for place in sweep.places() if not sweep.skipped(place)}
        for place in first.values():
            overrides = sweep.overrides(place, [*shlex.split(config.overrides), *passed])
            cfg = compose("config", of_configuration(overrides))
            check_machine(cfg, item.command, gpu=not is_for_gpus_elsewhere(item, config))


def run_missing(config: DictConfig, plan: Plan) -> dict[Overrides, str]:
    """Launch what is missing, block by block. Returns why runs failed."""
    failed: dict[Overrides, str] = {}
    runs = plan.all
    sweeps = Path(config.paths.results) / "sweeps" / "reproduction"
    for block in blocks(plan.missing()):
        work = missing_work(runs, block.runs, config.counts)
        start = time.perf_counter()
        problems = launch(block, sweeps, config.launcher)
        seconds = time.perf_counter() - start
        failed |= problems
        runs = [run.looked_up() for run in runs]
        alone = config.launcher is None and all(is_on_one_device(run) for run in block.runs)
        if alone and not problems and len(work.images) == 1:
            (model,) = work.images
            others = Work({}, work.edits, work.attacked)
            seconds -= rates(runs, config.assumed, kept(config), others).seconds(others)
            note_throughput(kept(config), model, work.total_images, seconds)
    return failed


def _chosen(config: DictConfig, given: Sequence[str]) -> Iterator[tuple[str, str, DictConfig]]:
    """Kinds, names and configurations: of those that are named, or of all of `config.every`."""
    named = [kind for kind in KINDS if kind in config]
    for kind in named:
        yield kind, "", config[kind]
    if named:
        return
    for kind in config.every:
        if kind not in KINDS:
            raise UserError(f"every={kind} is not allowed; choose from {', '.join(KINDS)}")
        for name in every_item(kind):
            with composer() as compose:
                node: DictConfig = compose("make", [*given, f"{kind}={name}"])[kind]
            yield kind, name, node


def command() -> int:
    """Exit status: 0, 2 after a user's mistake, 130 where the user interrupted."""
    try:
        return exit_status(main) or (USAGE_ERROR if mistakes else 0)
    except KeyboardInterrupt:
        log.warning("interrupted: the same command goes on where it stopped")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(command())
