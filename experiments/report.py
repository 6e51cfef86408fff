"""Every table and figure that was made, in one HTML page that needs no other file, and an index.

    python -m experiments.report only=mini      (make report MODEL=mini)

Makes nothing anew: it is put together from what experiments.make has left in its folder.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from cad.errors import UserError
from evaluation.files import write_atomically
from experiments.command_line import exit_status
from experiments.config import register_resolvers
from experiments.items.item import MINIATURE
from experiments.items.publishing import Section, page, published, read_section

PAPER = "Unveiling Concept Attribution in Diffusion Models"
TITLE = f"{PAPER}: a reproduction"
MINIATURES = (
    "What differs from the paper: the miniature is another model, a Stable-Diffusion-shaped one of "
    "64 x 64 pixels that this project trained, with its own classifier, CLIP and prompts and with "
    "fewer images (n is in the captions). The paper's values stand beside its own for orientation; "
    "that they differ says nothing against either. Faces stand for explicit content and five drawn "
    "styles for the artists."
)
PAPERS = (
    "What differs from the paper: a dagger marks every value of the paper that is outside our 95 % "
    "interval, and DEVIATIONS.md in the repository lists where the suite departs from it."
)

INDEX = "README.md"

log = logging.getLogger(__name__)

register_resolvers()


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
def main(config: DictConfig) -> None:
    log.info("%s", write_report(Path(config.output), config.only))


def write_report(folder: Path, model: str | None) -> Path:
    """Write report.html, or report-MODEL.html of one model's items, into the items' own folder.

    Beside it README.md, an index of the items' own markdown. Raises UserError where there are none.
    """
    items = [each for each in published(folder) if model is None or model in each["models"]]
    if not items:
        whose = f" of {model}" if model else ""
        raise UserError(
            f"output={folder} has no tables or figures{whose}: make one first, for instance with "
            f"make table1 MODEL={MINIATURE} FAST=1"
        )
    sections = [_with_progress(read_section(folder, facts), facts) for facts in items]
    path = folder / ("report.html" if model is None else f"report-{model}.html")
    write_atomically(path, page(TITLE, sections, lead(items)).encode())
    links = [
        f"- [{section.called}]({section.name}.md): {_subject(facts)}"
        for section, facts in zip(sections, items, strict=True)
    ]
    index = "\n\n".join([f"# {TITLE}", *lead(items), "\n".join(links)])
    write_atomically(folder / INDEX, f"{index}\n".encode())
    return path


def lead(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was run, on what, when, and what differs from the paper."""
    models = sorted({model for each in items for model in each["models"]})
    kinds = [each["kind"] for each in items]
    devices, commits = (
        sorted({value for each in items for value in each["making"][key]})
        for key in ("devices", "commits")
    )
    days = sorted({each["making"][key] for each in items for key in ("first", "last")} - {""})
    runs = {state: sum(each["runs"][state] for each in items) for state in items[0]["runs"]}
    when = f"from {days[0]} to {days[-1]}" if days and days[0] != days[-1] else "".join(days)
    first = (
        f"{kinds.count('table')} tables and {kinds.count('figure')} figures of {PAPER} "
        f"(arXiv 2412.02542), of {' and '.join(models)}. Of the runs that they show, counted in "
        f"each that shows them, {runs['done']} are done, {runs['missing']} are still to be run and "
        f"{runs['refused']} cannot be; a dash stands for what was not run. "
    )
    if days:
        first += f"Run {when} on {' and '.join(devices)}, commit {', '.join(commits)}. "
    if any(each["fast"] for each in items):
        first += "Some are fast versions, with fewer images and wider intervals; they say so. "
    papers = [model for model in models if model != MINIATURE]
    differs = [*([MINIATURES] if MINIATURE in models else []), *([PAPERS] if papers else [])]
    return [first.strip(), *differs]


def _subject(facts: Mapping[str, Any]) -> str:
    """An item's title without what it is called and of which model."""
    return str(facts["title"]).partition(": ")[2]


def _with_progress(section: Section, facts: Mapping[str, Any]) -> Section:
    """The section with how many of its runs are done, for the index; nothing if all are."""
    runs = facts["runs"]
    if runs["missing"] + runs["refused"] == 0:
        return section
    count = f"{runs['done']} of {sum(runs.values())} runs"
    return Section(section.name, f"{section.called} ({count})", section.html)


def command() -> int:
    """Exit status: 0, or 2 after a user's mistake."""
    return exit_status(main)


if __name__ == "__main__":
    sys.exit(command())
