"""The files of a table or figure: its own formats, a page, and the facts that a report asks for.

NAME.md, .csv and what else there is    NAME.html, made of NAME.md and NAME.png    NAME.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cad.errors import UserError
from cad.files import write_atomically
from experiments.run.results import read_json, write_json
from experiments.tables.exhibit import Exhibit, ListedRun
from experiments.tables.notes import origins
from experiments.tables.pages import page, read_section


@dataclass(frozen=True)
class Rendering:
    """A table or figure as it is shown."""

    notes: Sequence[str]  # paragraphs of the caption
    files: Mapping[str, bytes]  # by ending: "md", "csv", "png", ...
    filled: Mapping[str, bool]  # whether something is at a place: a cell, or a run of a figure
    panels: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # by heading, for the console


def publish(
    exhibit: Exhibit, rendering: Rendering, runs: Sequence[ListedRun], folder: Path
) -> dict[str, Path]:
    """Write the files into `folder`; returns them by ending.

    Raises UserError, and writes nothing, where what is there has more of these places filled.
    """
    facts = folder / f"{exhibit.name}.json"
    there = set(read_json(facts).get("filled", ())) if facts.exists() else set()
    before, now = len(there & rendering.filled.keys()), sum(rendering.filled.values())
    if now < before:
        raise UserError(
            f"{facts.with_suffix('.md')} has {before} of its {len(rendering.filled)} places filled "
            f"and would have {now}: it is left as it is. Delete {facts.name}, or render elsewhere "
            "with paths.results=DIR, if the emptier one is wanted"
        )
    paths = {ending: folder / f"{exhibit.name}.{ending}" for ending in (*rendering.files, "html")}
    for ending, content in rendering.files.items():
        write_atomically(paths[ending], content)
    whole = page(exhibit.full_title, [read_section(paths["md"])])
    write_atomically(paths["html"], whole.encode())
    known = {
        "models": list(exhibit.models),
        "fast": exhibit.fast,
        "runs": Counter(run.state for run in runs),
        "made": origins(runs),
        "filled": [place for place, filled in rendering.filled.items() if filled],
    }
    write_json(facts, known)
    return paths
