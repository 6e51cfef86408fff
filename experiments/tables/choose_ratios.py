"""Ratios chosen by generated pictures: the smallest that erases, the one that amplifies most.

    python -m experiments.tables.choose_ratios model=mini                (make ratios MODEL=mini)
    ... concepts=[church,tench] edits=[erase,contrast] ladder=[0.01,0.02,0.04] n=50 seed=7
    ... dry=true                    what is done and what is missing
    ... write=true                  and into conf/fragments/ratios_EDIT.yaml

A curve is climbed from its smallest value, each a run of its own: finished ones return at once, and
all share their concept's scores. Erasing ends at the first value that leaves the class at most
`bound`; where none does, the one that leaves least is chosen, of equal ones that which leaves more
of the others. Amplifying tries all, and chooses the largest gain of the class among those that cost
the others at most `cost`, or nothing. `<output>/EDIT.csv` has every point, and which was chosen.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.checks import flag, not_negative, whole
from cad.edits import CADAmplify
from cad.errors import UserError
from cad.files import write_atomically
from experiments.run.command_line import exit_status, find_mistake
from experiments.run.configuration import CONF, Compose, composer
from experiments.run.experiment import Experiment, prepare, run
from experiments.run.rendering import DASH, display, find_metric, show_table
from experiments.run.results import read_json
from experiments.tables.lookup import option_folders

RATIO = "ratio.value"  # the setting that conf/fragments has

CELLS = {  # of what was chosen
    "chosen": "{value:g}",
    "class": "{class_before:.1f} → {class:.1f}",
    "others": "{others_before:.1f} → {others:.1f}",
    "n": "{n_class}, {n_others}",
}

Point = Mapping[str, Any]
"""A run on a curve: its value of the setting, and the class and the others before and after."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curve:
    """The finished runs of an edit of a concept, by value."""

    points: Sequence[Point]
    best: Point | None  # one of them
    missing: float | None = None  # the value that is to be run next

    def row(self) -> dict[str, str]:
        """What was found, for people."""
        missing = DASH if self.missing is None else f"{self.missing:g}"
        told = {"tried": str(len(self.points)), "to be tried": missing}
        found = {name: each if self.best else DASH for name, each in CELLS.items()}
        return told | {name: each.format_map(self.best or {}) for name, each in found.items()}


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/ratios")
def main(config: DictConfig) -> None:
    paths = [each for each in HydraConfig.get().overrides.task if each.startswith("paths.")]
    choose_ratios(config, paths)


def choose_ratios(config: DictConfig, more: Sequence[str] = ()) -> None:
    """Climb every curve, keep its points, write what was chosen if asked to, and show all.

    `more` overrides are every run's. Raises UserError for a setting, and at the end for runs, that
    are refused.
    """
    _check(config)
    curves = [(edit, concept) for edit in config.edits for concept in config.concepts]
    shown, lost = [], []
    with composer(option_folders()) as compose, logging_redirect_tqdm():
        for edit, concept in tqdm(curves, "curves", unit="curve", disable=None):
            try:
                curve = climb(config, compose, edit, concept, more)
            except Exception as error:
                mistake = find_mistake(error)
                if mistake is None:
                    raise
                lost.append(f"{edit} of {concept}: {mistake}")
                log.error("%s", lost[-1])
                continue
            if not config.dry:
                keep(Path(config.output) / f"{edit}.csv", concept, curve)
                if config.write and curve.best and edit not in config.made_of:
                    found = {concept: curve.best["value"]}
                    write_ratios(CONF / "fragments", edit, config.model.name, found)
            shown.append({"edit": display(edit), "concept": display(concept)} | curve.row())
    show_table(pd.DataFrame(shown), f"{config.setting} of {config.model.name}, seed {config.seed}")
    log.info("%s", "nothing was run" if config.dry else f"the curves are in {config.output}")
    if lost:
        raise UserError(f"{len(lost)} of {len(curves)} curves are not whole: {'; '.join(lost)}")


def climb(
    config: DictConfig, compose: Compose, edit: str, concept: str, more: Sequence[str]
) -> Curve:
    """A curve up to its end, or if `config.dry` up to the first run that is missing."""
    chosen = config.made_of.get(edit, [f"edit={edit}"])
    same = [f"model={config.model.name}", f"concept={concept}", *chosen, "logger=none"]
    same += [f"images_per_class={config.n}", f"others_per_class={config.others}"]
    same += [f"seed={config.seed}", *config.overrides, *more]
    points: list[Point] = []
    for value in sorted(config.ladder):
        experiment = prepare(compose([*same, f"{config.setting}={value}"]))
        amplifies, folder = isinstance(experiment.method, CADAmplify), experiment.folder
        done = folder.is_complete()
        if config.dry and not done:
            return Curve(points, None, value)
        result = folder.final if done else run(experiment, f"ratios-{edit}")
        points.append({"concept": concept, "value": value, **measure(experiment, result)})
        if not (amplifies or config.whole) and points[-1]["class"] <= config.bound:
            break
    best = largest_gain(points, config.cost) if amplifies else smallest(points, config.bound)
    return Curve(points, best)


def measure(experiment: Experiment, result: Path) -> Point:
    """The class and the others before and after a run, by its first evaluator."""
    name, metrics = experiment.evaluators[0].name, read_json(result / "metrics.json")
    found: dict[str, Any] = {"metric": name}
    for scope, column in (("target", "class"), ("others", "others")):
        for state, ending in (("before", "_before"), ("after", "")):
            row = find_metric(metrics, name, scope, state)
            if row is None:
                raise UserError(f"{name} has no value of the {column} {state} the edit")
            found |= {f"{column}{ending}": row["value"], f"n_{column}": row["n"]}
    return found | {"seed": metrics["seed"], "result": result.name}


def smallest(points: Sequence[Point], bound: float) -> Point:
    """The smallest value that erases; where none does, the one that leaves least of the class."""
    erasing = [each for each in points if each["class"] <= bound]
    if erasing:
        return min(erasing, key=lambda each: each["value"])
    return min(points, key=lambda each: (each["class"], -each["others"], each["value"]))


def largest_gain(points: Sequence[Point], cost: float) -> Point | None:
    """The value at which the class gains most, of those that the others can pay; None for none."""
    paid = [
        each
        for each in points
        if each["class"] > each["class_before"] and each["others_before"] - each["others"] <= cost
    ]
    return max(paid, key=lambda each: (each["class"], each["others"], -each["value"]), default=None)


def keep(path: Path, concept: str, curve: Curve) -> None:
    """Write a curve into its edit's file, in place of the concept's earlier one."""
    frame = pd.DataFrame([{**each, "chosen": each is curve.best} for each in curve.points])
    if path.exists():
        there = pd.read_csv(path)
        frame = pd.concat([there[there["concept"] != concept], frame], ignore_index=True)
    write_atomically(path, frame.to_csv(index=False).encode())


def write_ratios(folder: Path, edit: str, model: str, found: Mapping[str, float]) -> None:
    """Write ratios by concept beside the model's others in <folder>/ratios_<edit>.yaml.

    Raises UserError where there is no such file.
    """
    path = folder / f"ratios_{edit}.yaml"
    if not path.exists():
        raise UserError(f"edit={edit} reads no {path}: use write=false")
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    rows = OmegaConf.merge(OmegaConf.load(path), {model: found})
    for name, row in rows.items():
        ratios = ", ".join(f"{key}: {value:g}" for key, value in row.items())
        head.append(f"{name!s}: {{{ratios}}}")
    write_atomically(path, ("\n".join(head) + "\n").encode())


def _check(config: DictConfig) -> None:
    rules = {"dry": flag, "write": flag, "whole": flag, "bound": not_negative, "cost": not_negative}
    for key, rule in {**rules, "n": whole(1), "others": whole(1)}.items():
        rule(key, config[key])
    for key in ("edits", "concepts", "ladder"):
        if not OmegaConf.is_list(config[key]) or not config[key]:
            raise UserError(f"{key}={config[key]} is not allowed: list at least one, {key}=[...]")
    if config.write and config.setting != RATIO:
        raise UserError(f"write=true writes {RATIO}, and setting={config.setting}: write=false")


if __name__ == "__main__":
    sys.exit(exit_status(main))
