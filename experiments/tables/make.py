"""Make the paper's tables: find which runs are missing, run them, render.

    python -m experiments.tables.make table=table01 model=mini            (make table1 MODEL=mini)
    python -m experiments.tables.make table=table01 model=mini dry=true   the plan alone
    python -m experiments.tables.make status=true model=mini              all tables at a glance

Interrupt and repeat as you like: what is done is never run again. conf/tables.yaml has the
settings, conf/table the tables.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cad.errors import UserError
from experiments.command_line import USAGE_ERROR, exit_status
from experiments.composing import CONF, composer
from experiments.config import register_resolvers
from experiments.mistakes import SHOWN, find_mistake
from experiments.rendering import show_table
from experiments.tables.cells import build_cells
from experiments.tables.estimate import Work, missing_work, note_throughput, rates
from experiments.tables.launch import blocks, launch
from experiments.tables.notes import table_notes
from experiments.tables.overview import Plan, kept, plan_table, show_plan, status_line, summary
from experiments.tables.paper import Published
from experiments.tables.plan import Overrides, of_configuration
from experiments.tables.preflight import check_machine
from experiments.tables.rendering import MARKDOWN, layout, panels, show, title_of, write_table
from experiments.tables.table import MINIATURE, MODEL, Table, read_table
from experiments.tracking import Tracker

INTERRUPTED = 130  # exit status
PASSED_ON = ("paths.", "logger")  # overrides of this program that runs are given too

log = logging.getLogger(__name__)
mistakes: list[str] = []  # of this process

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="tables")
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
    """Everything that was asked for. UserError, after the others, for tables that cannot be made.

    `given` are this program's overrides, of which runs are `passed` some.
    """
    everything = "table" not in config
    model = str(config.model.name) if "model" in config else None
    refused, lines = [], []
    for name, node in _chosen_tables(config, given):
        if everything and model not in (None, MINIATURE, *node.models):
            log.info("%s is of %s alone", name, ", ".join(node.models))
            continue
        try:
            table = read_table(node, model, config.fast)
            if config.status:
                lines.append(status_line(config, plan_table(config, table, passed, whole=False)))
            elif config.dry:
                show_plan(config, plan_table(config, table, passed, whole=False))
            else:
                make_table(config, table, passed)
        except SHOWN as error:
            message = find_mistake(error)
            if message is None or not everything:
                raise
            log.error("%s: %s", name, message)
            refused.append(name)
    if config.status:
        show_table(pd.DataFrame(lines), "tables")
    if refused:
        raise UserError(f"not made, for the reasons above: {', '.join(refused)}")


def every_table() -> list[str]:
    """The tables of conf/table, in order."""
    return sorted(path.stem for path in (CONF / "table").glob("*.yaml"))


def make_table(config: DictConfig, table: Table, passed: Sequence[str]) -> dict[str, Path]:
    """Run what is missing and render what there is. Returns the files by ending."""
    if not (config.render or table.is_miniature):
        check_models(config, table, passed)
    plan = plan_table(config, table, passed)
    log.info("%s\n%s", title_of(table), summary(config, plan))
    failed = {} if config.render else run_missing(config, plan)
    plan = plan.looked_up()
    published = Published(Path(config.published), table.config.number)
    cells = build_cells(table, plan.runs, published)
    notes = table_notes(table, cells, plan.all, failed)
    show(table, cells, notes)
    paths = write_table(table, cells, notes, Path(config.output))
    for path in paths.values():
        log.info("%s", path)
    tracker: Tracker = hydra.utils.instantiate(config.logger)
    shown = panels(layout(table, cells, MARKDOWN))
    tracker.log_table(table.name, shown, notes, paths["html"], kept(config))
    return paths


def check_models(config: DictConfig, table: Table, passed: Sequence[str]) -> None:
    """Raise UserError where a model's runs cannot be made here; composes one run of each model."""
    number = table.config.number
    with composer() as compose:
        first = {place[MODEL]: place for place in table.places() if not table.skipped(place)}
        for place in first.values():
            overrides = table.overrides(place, [*shlex.split(config.overrides), *passed])
            cfg = compose("config", of_configuration(overrides))
            check_machine(cfg, f"make table{number} MODEL={MINIATURE}")


def run_missing(config: DictConfig, plan: Plan) -> dict[Overrides, str]:
    """Launch what is missing, block by block. Returns why runs failed."""
    failed: dict[Overrides, str] = {}
    runs = plan.all
    for block in blocks(plan.missing()):
        work = missing_work(runs, block.runs, config.counts)
        start = time.perf_counter()
        problems = launch(block, Path(config.paths.results) / "sweeps" / "tables", config.launcher)
        seconds = time.perf_counter() - start
        failed |= problems
        runs = [run.looked_up() for run in runs]
        if not problems and len(work.images) == 1:
            (model,) = work.images
            edits = Work({}, work.edits)
            seconds -= rates(runs, config.assumed, kept(config), edits).seconds(edits)
            note_throughput(kept(config), model, work.total_images, seconds)
    return failed


def _chosen_tables(config: DictConfig, given: Sequence[str]) -> Iterator[tuple[str, DictConfig]]:
    """Names and configurations: of the one that was chosen, or of all."""
    if "table" in config:
        yield "", config.table
        return
    for name in every_table():
        with composer() as compose:
            node: DictConfig = compose("tables", [*given, f"table={name}"]).table
        yield name, node


def command() -> int:
    """Exit status: 0, 2 after a user's mistake, 130 where the user interrupted."""
    try:
        return exit_status(main) or (USAGE_ERROR if mistakes else 0)
    except KeyboardInterrupt:
        log.warning("interrupted: the same command goes on where it stopped")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(command())
