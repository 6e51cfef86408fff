"""Make a table or figure: make the runs that are not there, one after another, and show them all.

    python run.py table=table07 model=mini                       (make table7 MODEL=mini)
    python run.py table=table07 model=mini making.dry=true       its runs and their states alone
    python run.py figure=figure7 model=mini making.fast=true     fewer and smaller, in minutes

`run.py` comes here when a table or figure is chosen; `making` in conf/config.yaml has the settings.
Interrupt and repeat as you like: a finished run is never made again.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm import tqdm

from cad.checks import flag, only, optional, text, whole
from cad.errors import UserError
from cad.models.base import PUBLISHED, resolve_device
from cad.models.stable_diffusion_3 import T5_PARTS
from cad.places import REPOSITORY
from experiments.run.arguments import build
from experiments.run.command_line import LINK, find_mistake
from experiments.run.configuration import Compose, composer
from experiments.run.experiment import prepare, run
from experiments.run.rendering import show_table
from experiments.run.results import read_json
from experiments.run.tracking import Tracker
from experiments.tables.exhibit import (
    EDIT,
    MINIATURE,
    MODEL,
    SCHEMAS,
    SEED,
    STATES,
    Exhibit,
    ListedRun,
    filtered,
    read_exhibit,
    with_methods,
    with_seeds,
)
from experiments.tables.figures.drawing import render_figure
from experiments.tables.layout import render_table
from experiments.tables.lookup import RunNames, look_up, option_folders, options
from experiments.tables.publishing import Rendering, publish

RENDER: dict[str, Callable[..., Rendering]] = {"table": render_table, "figure": render_figure}
OWN = ("table=", "figure=", "model=", "making.")  # overrides that are not for the runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A command of run.py that chose a table or figure."""

    cfg: DictConfig
    overrides: Sequence[str]  # its own, without Hydra's
    compose: Compose
    folders: Sequence[str] = ()  # of further options (--config-dir)
    launcher: Sequence[str] = ()  # overrides of Hydra's launcher; (): runs are made here

    def list_runs(self, exhibit: Exhibit) -> list[ListedRun]:
        """The exhibit's runs, with the command's overrides."""
        return exhibit.list_runs([each for each in self.overrides if not each.startswith(OWN)])

    def jobs(self, exhibit: Exhibit) -> Path:
        """The folder of a launcher's jobs, which are named by the numbers of their runs."""
        return Path(self.cfg.paths.results) / "sweeps" / exhibit.name


def make(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Make the table or figure that a command chose, or each that the chosen file lists.

    `overrides` are the command's, without those of Hydra. Raises UserError, after everything else
    is done, where something could not be made.
    """
    making = cfg.making
    for key in ("fast", "dry", "render"):
        flag(f"making.{key}", making[key])
    for key in ("filter", "methods"):
        text(f"making.{key}", making[key])
    optional(whole(0))("making.run", making.run)
    for seed in only(lambda x: isinstance(x, Sequence), "a list")("making.seeds", making.seeds):
        whole(0)("making.seeds", seed)
    if making.seeds and SEED in options(overrides):
        raise UserError("both seed and making.seeds are given: leave one of them out")
    folders, lost = option_folders(), []
    with composer(folders) as compose:
        command = Command(cfg, overrides, compose, folders, _launcher())
        exhibits = read_exhibits(command)
        for exhibit in exhibits:
            try:
                if cfg.making.run is None:
                    make_exhibit(command, exhibit)
                else:
                    make_one(command, exhibit, cfg.making.run)
            except UserError as error:
                if len(exhibits) == 1:
                    raise
                log.error("%s: %s", exhibit.called, error)
                lost.append(exhibit.called)
    if lost:
        raise UserError(f"not made, or not whole, for the reasons above: {', '.join(lost)}")


def read_exhibits(command: Command) -> list[Exhibit]:
    """The chosen table or figure; of a file that lists several, those that the model has."""
    making, chosen, found = command.cfg.making, options(command.overrides), []
    model = chosen.get(MODEL)
    for group in SCHEMAS.keys() & command.cfg.keys():
        listed = command.cfg[group].get("each")
        for stem in listed or [chosen[group]]:
            node = command.compose([f"{group}={stem}"])[group] if listed else command.cfg[group]
            if listed and model not in (None, MINIATURE, *node.models):
                log.info("%s is of %s alone", node.called, ", ".join(node.models))
                continue
            exhibit = with_seeds(read_exhibit(group, stem, node, model, making.fast), making.seeds)
            fixed = listed and EDIT not in exhibit.axes
            found.append(exhibit if fixed else with_methods(exhibit, making.methods))
    return found


def make_exhibit(command: Command, exhibit: Exhibit) -> None:
    """Make the runs that are missing, and show all. Raises UserError where one has no result."""
    making = command.cfg.making
    runs = find_runs(command, exhibit)
    wanted = filtered(runs, making.filter, exhibit)
    states = Counter(each.state for each in wanted)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES)
    log.info("%s: %d runs: %s", exhibit.full_title, len(wanted), counts)
    if making.dry:
        show_runs(exhibit, wanted)
    lost = _unexpected(exhibit, wanted)
    if lost and (making.dry or len(lost) == len(wanted)):
        raise UserError(lost[0])
    if making.dry:
        return
    for reason in dict.fromkeys(lost):
        log.warning("%s", reason)
    missing = [] if making.render else [each for each in wanted if each.is_missing]
    check_models(command, exhibit, missing)
    if missing and command.launcher:
        launch(command, exhibit, missing)
        return
    for each in tqdm(missing, exhibit.called, unit="run", disable=None):
        runs[each.number] = attempt(command, exhibit, each)
    render(command, exhibit, [_with_reason(command, exhibit, each) for each in runs])
    lost = _unexpected(exhibit, [runs[each.number] for each in wanted])
    if lost:
        raise UserError(f"{len(lost)} of {len(wanted)} runs left no result: {lost[0]}")


def make_one(command: Command, exhibit: Exhibit, number: int) -> None:
    """Make one run alone, as a launcher's job does. Raises UserError where it cannot be made."""
    runs = command.list_runs(exhibit)
    if not 0 <= number < len(runs):
        raise UserError(f"making.run={number}: {exhibit.called} has runs 0 to {len(runs) - 1}")
    if runs[number].refused:
        raise UserError(runs[number].refused)
    check_models(command, exhibit, [runs[number]])
    run(prepare(command.compose(runs[number].overrides)), exhibit.name)


def find_runs(command: Command, exhibit: Exhibit) -> list[ListedRun]:
    """The exhibit's runs as they are on disk now."""
    names = RunNames(Path(command.cfg.paths.runs), command.folders)
    listed = command.list_runs(exhibit)
    bar = tqdm(listed, "looking for results", unit="run", leave=False, disable=None)
    found = [look_up(each, command.compose, names) for each in bar]
    names.save()
    return found


def check_models(command: Command, exhibit: Exhibit, runs: Sequence[ListedRun]) -> None:
    """Raise UserError where a model of the runs needs a GPU or weights that are not here.

    Downloads weights that can be downloaded, but not where a GPU is lacking. A device that is named
    (device=cpu) is taken as meant; a launcher's jobs look for themselves.
    """
    instead = f"python run.py {exhibit.group}={exhibit.stem} model={MINIATURE}"
    auto = command.cfg.device == "auto" and not command.launcher
    for name, each in {each.place[MODEL]: each for each in runs}.items():
        if name == MINIATURE:
            continue
        model = prepare(command.compose(each.overrides)).model
        source = model.source
        if auto and resolve_device("auto").type == "cpu":
            gated = ", gated: accept the licence there and set a token" if source.gated else ""
            raise UserError(
                f"model={name} cannot be run here: it needs a GPU, and this machine has none. (Its "
                f"weights are those of {source.repo or source.path}, about {source.size_gb:g} GB, "
                f"licence {source.licence}{gated}.) The miniature can be made here and now: "
                f"{instead}. device=cpu makes {name}'s without a GPU, in weeks"
            )
        try:
            if model.weights == PUBLISHED:
                source.locate(() if model.t5 else T5_PARTS)
        except UserError as error:
            raise UserError(f"{error} The miniature: {instead}") from error


def attempt(command: Command, exhibit: Exhibit, listed: ListedRun) -> ListedRun:
    """Make a run. Whatever it fails with, the others go on, and the reason is kept."""
    try:
        prepared = prepare(command.compose(listed.overrides))
        return replace(listed, result=run(prepared, exhibit.name))
    except Exception as error:
        reason = find_mistake(error)
        trace = error if reason is None else None
        reason = reason or f"{type(error).__name__}: {error}"
        log.error("%s: %s", " ".join(listed.overrides), reason, exc_info=trace)
        return replace(listed, failed=reason)


def launch(command: Command, exhibit: Exhibit, runs: Sequence[ListedRun]) -> None:
    """Make runs as jobs of Hydra's launcher, and show all in a last one, on a machine like theirs.

    Waits for them; what they print is shown as it comes. Raises UserError where one failed.
    """
    own = [each for each in command.overrides if not each.startswith(("table=", "figure="))]
    own += [f"{exhibit.group}={exhibit.stem}", *command.launcher]
    if command.folders:
        own.append(f"hydra.searchpath=[{','.join(f'file://{each}' for each in command.folders)}]")
    jobs, failed = command.jobs(exhibit), False
    numbers = ",".join(str(each.number) for each in runs)
    for task, folder, subfolder in (
        (f"making.run={numbers}", jobs, "${making.run}"),
        ("making.render=true", jobs / "rendering", "0"),
    ):
        places = [f"hydra.sweep.dir={folder}", f"hydra.sweep.subdir={subfolder}"]
        program = [sys.executable, str(REPOSITORY / "run.py"), "-m", *own, task, *places]
        log.info("%s", " ".join(program))
        failed |= subprocess.run(program, check=False).returncode != 0
    if failed:
        raise UserError(f"a job failed, for the reasons above; the jobs' logs are in {jobs}")


def render(command: Command, exhibit: Exhibit, runs: Sequence[ListedRun]) -> None:
    """Show and write what there is. Raises UserError where an earlier rendering has more."""
    rendering = RENDER[exhibit.group](exhibit, runs)
    for head, frame in rendering.panels.items():
        show_table(frame, f"{exhibit.full_title}{': ' if head else ''}{head}")
    show_table(pd.DataFrame({"": list(rendering.notes)}), "")
    folder = Path(command.cfg.paths.results) / "reproduction"
    paths = publish(exhibit, rendering, runs, folder)
    for path in paths.values():
        log.info("%s", path)
    tracker: Tracker = build(command.cfg.logger)
    tracker.log_item(exhibit.name, rendering.panels, rendering.notes, paths)


def show_runs(exhibit: Exhibit, runs: Sequence[ListedRun]) -> None:
    """Print the runs with their states."""
    several = [axis for axis, values in exhibit.axes.items() if len(values) > 1]
    names = [" ".join(f"{axis}={each.place[axis]}" for axis in several) for each in runs]
    states = [f"{each.state}{': ' * bool(each.refused)}{each.refused}" for each in runs]
    show_table(pd.DataFrame({"run": names, "state": states}), exhibit.full_title)


def _unexpected(exhibit: Exhibit, runs: Sequence[ListedRun]) -> list[str]:
    """Why runs have no result, but for those that the exhibit's file skips."""
    reasons = [each.refused or each.failed for each in runs]
    return [each for each in reasons if each and each not in exhibit.skip]


def _launcher() -> tuple[str, ...]:
    """The overrides of Hydra's launcher that was chosen; () in a job of it."""
    if not HydraConfig.initialized() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return ()
    given = HydraConfig.get().overrides.hydra
    return tuple(each for each in given if each.startswith(("hydra/launcher=", "hydra.launcher.")))


def _with_reason(command: Command, exhibit: Exhibit, listed: ListedRun) -> ListedRun:
    """The run; if it is missing, with the reason that a launcher's job has left."""
    note = command.jobs(exhibit) / str(listed.number) / LINK
    if not listed.is_missing or listed.failed or not note.exists():
        return listed
    return replace(listed, failed=read_json(note)["error"] or "")
