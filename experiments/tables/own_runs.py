"""A report's part on the runs and sweeps that are in paths.results, of tables or not."""

from __future__ import annotations

import logging
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from experiments.run.rendering import (
    compare_runs,
    display,
    display_words,
    join_concepts,
    result_table,
    run_settings,
    title,
    to_markdown,
)
from experiments.run.results import MANIFEST, read_json
from experiments.tables.pages import Card, Section, embed, mark, to_html

log = logging.getLogger(__name__)

PICTURED = 200  # the newest runs have their pictures in the page, the others a table alone
PICTURES = ("before_after.png", "attack.png")
IN_NAME = ("edit", "concept")  # columns that the name of a run stands for
WIDTH = 900  # pixels of a run's pictures


def read_cards(runs: Path, model: str | None) -> list[Card]:
    """The finished runs of a model, or of all, the newest first."""
    folders = sorted(runs.glob(f"*/{MANIFEST}"), key=lambda path: -path.stat().st_mtime)
    read = {path.parent: read_json(path.parent / "metrics.json") for path in folders}
    for folder in [folder for folder, each in read.items() if not _belongs(each, model, folder)]:
        del read[folder]
    if not read:
        return []
    frame, _ = compare_runs(list(read.values()))
    frame.columns = frame.columns.astype(str)
    measured = [key for key in frame.columns if ", " in key]
    rows = frame[measured + [key for key in frame.columns if key not in (*measured, *IN_NAME)]]
    return [
        Card(
            name=folder.name,
            short=f"{display(metrics['edit']['name'])}: {display_words(join_concepts(metrics))}",
            title=title(metrics),
            cells={str(key): mark(escape(str(cell))) for key, cell in cells.items()},
            html=_describe(folder, metrics, pictured=number < PICTURED),
        )
        for number, ((folder, metrics), (_, cells)) in enumerate(
            zip(read.items(), rows.iterrows(), strict=True)
        )
    ]


def read_sweeps(sweeps: Path, model: str | None) -> list[Section]:
    """The multiruns of a model, or of all: their tables and plots."""
    sections = []
    for path in sorted(sweeps.glob("*/table.md"), key=lambda path: -path.stat().st_mtime):
        table = pd.read_csv(path.with_name("sweep.csv"))
        if model not in (None, *table["model"]):
            continue
        told = OmegaConf.load(path.with_name("multirun.yaml"))
        name = " ".join(told.hydra.overrides.task)
        drawn = [each.name for each in path.parent.glob("*.png")]
        pictures = [f"![{each}]({each})" for each in sorted(drawn, reverse=True)]
        text = "\n\n".join([f"## Sweep: {name}", path.read_text(encoding="utf-8"), *pictures])
        models = " and ".join(sorted(set(table["model"])))
        html = to_html(text, path.parent)
        sections.append(Section(f"sweep-{path.parent.name}", "Sweep", models, name, html))
    return sections


def _belongs(metrics: dict[str, Any], model: str | None, folder: Path) -> bool:
    """Whether a run is of the model, and has all that a run of today has."""
    try:
        title(metrics), run_settings(metrics)
    except KeyError as error:
        log.warning("%s is left out: an older version made it, without %s", folder, error)
        return False
    return model in (None, metrics["model"]["name"])


def _describe(folder: Path, metrics: dict[str, Any], *, pictured: bool) -> str:
    """The run's own table and, if it is to be pictured, its images before and after."""
    table = to_markdown(result_table(metrics, read_json(folder / "cost.json")))
    shown = [folder / name for name in PICTURES if pictured and (folder / name).exists()]
    drawn = [f'<img alt="{path.stem}" src="{embed(path, WIDTH)}">' for path in shown]
    return "".join([*drawn, to_html(table, folder)])
