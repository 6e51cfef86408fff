"""Runs, sweeps, tables and figures in one HTML page that needs no other file, and an index.

    python -m experiments.tables.report model=mini      (make report MODEL=mini)

It makes nothing anew: the runs and sweeps in paths.results and what was rendered in
results/reproduction are put together; a table or figure that was not made is taken from
results/mini, which comes with the repository.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from cad.errors import UserError
from cad.files import write_atomically
from cad.places import REPOSITORY
from experiments.run.command_line import exit_status
from experiments.run.results import read_json
from experiments.tables.exhibit import MINIATURE, by_number
from experiments.tables.own_runs import read_cards, read_sweeps
from experiments.tables.pages import Section, page, read_section, render

PAPER = "Unveiling Concept Attribution in Diffusion Models"
TITLE = f"{PAPER}: a reproduction"
SHIPPED = REPOSITORY / "results" / MINIATURE
INDEX = "README.md"

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/report")
def main(config: DictConfig) -> None:
    """Write the report of one model, or of all."""
    model = None if config.get("model") is None else str(config.model.name)
    paths = config.paths
    log.info("%s", write_report(Path(paths.results) / "reproduction", model, Path(paths.runs)))


def write_report(folder: Path, model: str | None, runs: Path, shipped: Path = SHIPPED) -> Path:
    """Write report.html, or report-MODEL.html of one model's results, into the folder of exhibits.

    Beside it README.md, an index of their markdown. Raises UserError where there is nothing.
    """
    cards, sweeps = read_cards(runs, model), read_sweeps(folder.parent / "sweeps", model)
    made = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    made = {name: each for name, each in made.items() if model in (None, *each["models"])}
    files = {path.stem: path for path in shipped.glob("*.md") if path.name != INDEX}
    files = files if model in (None, MINIATURE) else {}
    files |= {name: folder / f"{name}.md" for name in made}
    if not (files or cards):
        raise UserError(
            f"{folder} has no tables or figures of {model}, and {runs} no run: make one first, for "
            "instance with python run.py table=table01 model=mini making.fast=true"
        )
    names = sorted(files, key=by_number)
    sections = [_with_progress(read_section(files[name]), made.get(name)) for name in names]
    sections.sort(key=lambda each: ("Table" not in each.called, "Figure" not in each.called))
    lead = _lead(sections, list(made.values()))
    links = [
        f"- [{each.called}]({os.path.relpath(files[each.name], folder)}): {each.subject}"
        for each in sections
    ]
    index = "\n\n".join([f"# {TITLE}", *lead, "\n".join(links)])
    write_atomically(folder / INDEX, f"{index}\n".encode())
    path = folder / ("report.html" if model is None else f"report-{model}.html")
    write_atomically(path, page(TITLE, [*sweeps, *sections], lead, cards).encode())
    return path


def _with_progress(section: Section, facts: Mapping[str, Any] | None) -> Section:
    """The section with how many of its runs are done, for the index; nothing if all are."""
    done, whole = (facts["runs"].get("done", 0), sum(facts["runs"].values())) if facts else (0, 0)
    if done == whole:
        return section
    return replace(section, called=f"{section.called} ({done} of {whole} runs)")


def _lead(sections: Sequence[Section], made: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paragraphs that say what was run, on what, when, and what differs from the paper."""
    text = render(
        "lead.txt.j2",
        paper=PAPER,
        sections=sections,
        tables=sum("Table" in each.called for each in sections),
        made=made,
        models=sorted({name for each in sections for name in each.models.split(" and ")}),
        origins=sorted({origin for each in made for origin in each["made"]}),
    )
    return text.strip().split("\n\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
