"""The files of a table or figure: its own formats, a page, and the facts that a report asks for.

NAME.md, .csv and what else there is    NAME.html, made of NAME.md and NAME.png    NAME.json
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from cad.errors import UserError
from cad.files import write_atomically
from experiments.run.results import read_json, write_json
from experiments.tables.exhibit import Exhibit, ListedRun
from experiments.tables.notes import origins

TITLE = re.compile(r"\A\*\*(.+), (.+?): (.+)\*\*")  # called, models: subject
PICTURE = re.compile(r'src="([^":]+\.png)"')


@dataclass(frozen=True)
class Rendering:
    """A table or figure as it is shown."""

    notes: Sequence[str]  # paragraphs of the caption
    files: Mapping[str, bytes]  # by ending: "md", "csv", "png", ...
    filled: Mapping[str, bool]  # whether something is at a place: a cell, or a run of a figure
    panels: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # by heading, for the console


@dataclass(frozen=True)
class Section:
    """A table or figure in a page."""

    name: str  # of its files
    called: str
    models: str
    subject: str
    html: str


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


def read_section(path: Path) -> Section:
    """A table or figure out of its markdown, with the pictures that lie beside it."""

    def embed(found: re.Match[str]) -> str:
        encoded = base64.b64encode((path.parent / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{encoded}"'

    text = path.read_text(encoding="utf-8")
    title = TITLE.match(text)
    if title is None:
        raise UserError(f"{path} is no table or figure: its first line has no title")
    body = MarkdownIt("js-default").render(TITLE.sub(r"## \1, \2: \3", text))
    return Section(path.stem, title[1], title[2], title[3], PICTURE.sub(embed, body))


def page(title: str, sections: Iterable[Section], lead: Sequence[str] = ()) -> str:
    """A whole HTML page that needs no other file; with a `lead`, title and index come first."""
    return render("page.html.j2", title=title, sections=sections, lead=lead)


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values; those of HTML are escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)
