"""The state of every table and figure, told in seconds: which runs are done and which missing.

    python -m experiments.tables.status model=mini      (make status MODEL=mini)

A run without a folder of its model, concept and edit is missing; which of the others are done is
looked up once (`experiments.tables.lookup`). Nothing is verified: making a table does that.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Column, Table

from cad.checks import flag, texts
from cad.places import REPOSITORY
from experiments.run.command_line import exit_status
from experiments.run.configuration import CONF, Compose, composer
from experiments.tables.exhibit import (
    MINIATURE,
    SCHEMAS,
    STATES,
    Exhibit,
    ListedRun,
    by_number,
    read_exhibit,
)
from experiments.tables.lookup import DEFAULTS, RunNames, option_folders, options

HEADINGS = ("", "of", *STATES, "editing", "files")
CAPTION = "editing: of missing runs, by finished edits of the same model and method"
DASH = "–"
FULL = "\nquick: {}\n"  # in the configuration of a run without debug=tiny


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/status")
def main(config: DictConfig) -> None:
    """Print a line for each table and figure of the model that was named, or of the paper's."""
    columns = (Column(heading, no_wrap=True) for heading in HEADINGS)
    table = Table(*columns, caption=CAPTION, caption_justify="left")
    for exhibit, runs in find_all(config):
        table.add_row(*line(exhibit, runs, config.paths))
    Console(highlight=False).print(table)


def find_all(
    config: DictConfig, schema: type[Exhibit] = Exhibit
) -> Iterator[tuple[Exhibit, list[ListedRun]]]:
    """The tables and figures of the model that the command named, with their runs as they are.

    `schema`: `Table` or `Figure` alone.
    """
    folders, given = option_folders(), HydraConfig.get().overrides.task
    paths = [each for each in given if each.startswith("paths.")]
    fast, overrides = flag("fast", config.fast), texts("overrides", config.overrides)
    names = RunNames(Path(config.paths.runs), folders)
    with composer(folders) as compose:
        model = options(given).get("model")
        for exhibit in every_exhibit([CONF, *folders], model, fast, compose):
            if isinstance(exhibit, schema):
                listed = exhibit.list_runs([*overrides, *paths])
                yield exhibit, [names.find(each, compose) for each in listed]
    names.save()


def every_exhibit(
    folders: Sequence[str | Path], model: str | None, fast: bool, compose: Compose
) -> Iterator[Exhibit]:
    """The tables and figures in these folders of options that the chosen model has."""
    files = [
        (group, path.stem)
        for group in SCHEMAS
        for folder in folders
        for path in sorted(Path(folder, group).glob("*.yaml"), key=lambda p: by_number(p.stem))
    ]
    nodes = compose([f"+{group}@exhibits.{group}.{stem}={stem}" for group, stem in files]).exhibits
    for group, stem in files:
        node = nodes[group][stem]
        if "each" not in node and model in (None, MINIATURE, *node.models):
            yield read_exhibit(group, stem, node, model, fast)


def line(exhibit: Exhibit, runs: Sequence[ListedRun], paths: DictConfig) -> list[str]:
    """An exhibit's cells: its runs by state, the measured time of what is missing, its files."""
    states = Counter(run.state for run in runs)
    edits = [DEFAULTS | options(run.overrides) for run in runs if run.is_missing]
    seconds = [editing_seconds(Path(paths.runs), each["model"], each["edit"]) for each in edits]
    known = [each for each in seconds if each is not None]
    least = "≥ " if len(known) < len(seconds) else ""
    file = f"{exhibit.name}.md"
    made = Path(paths.results, "reproduction", file).exists()
    shipped = (REPOSITORY / "results" / MINIATURE / file).exists()
    return [
        exhibit.called,
        ", ".join(exhibit.models),
        *(str(states[state]) for state in STATES),
        f"{least}{sum(known):,.0f} s" if known else DASH,
        "made" if made else "shipped" if shipped else DASH,
    ]


@functools.cache
def editing_seconds(runs: Path, model: str, edit: str) -> float | None:
    """The median time of a model's finished edits by a method, those of debug=tiny aside."""
    costs = []
    for path in runs.glob(f"{model}-*-{edit}-*/cost.json"):
        with suppress(OSError, ValueError, TypeError, LookupError):  # damaged: made again
            if FULL in path.with_name("config.yaml").read_text(encoding="utf-8"):
                costs.append(float(json.loads(path.read_text(encoding="utf-8"))["seconds"]))
    return statistics.median(costs) if costs else None


if __name__ == "__main__":
    sys.exit(exit_status(main))
