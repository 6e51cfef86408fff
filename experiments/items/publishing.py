"""An item's files: its own formats, a standalone HTML page, and the facts that a report asks for.

    NAME.md, .csv and what else the item has    NAME.html    NAME.json

The page's <section> is the item; a report is a page of many of them.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.files import write_atomically
from experiments.items.item import Item
from experiments.items.notes import making
from experiments.items.plan import Run, State
from experiments.rendering import show_table
from experiments.results import read_json, write_json

TEMPLATE = "page.html.j2"
BEGIN, END = "<section", "</section>"


@dataclass(frozen=True)
class Rendered:
    """What an item looks like."""

    notes: Sequence[str]  # paragraphs of the caption
    body: str  # HTML, without title and notes
    files: Mapping[str, bytes]  # by ending: "md", "csv", "png", ...
    panels: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # by heading, for the console


@dataclass(frozen=True)
class Section:
    """An item in a page."""

    name: str
    called: str
    html: str


def publish(item: Item, rendered: Rendered, runs: Sequence[Run], folder: Path) -> dict[str, Path]:
    """Write the item's files into `folder`; returns them by ending."""
    section = Section(item.name, item.called, _section(item, rendered))
    files = {**rendered.files, "html": page(item.title, [section]).encode()}
    paths = {ending: folder / f"{item.name}.{ending}" for ending in files}
    for ending, content in files.items():
        write_atomically(paths[ending], content)
    states = [run.state for run in runs]
    facts = {
        "name": item.name,
        "kind": type(item).__name__.lower(),
        "called": item.called,
        "title": item.title,
        "models": list(item.sweep.models),
        "fast": item.sweep.fast,
        "runs": {state.value: states.count(state) for state in State},
        "making": asdict(making(runs)),
    }
    write_json(folder / f"{item.name}.json", facts)
    return paths


def published(folder: Path) -> list[dict[str, Any]]:
    """The facts of every item in a folder: tables, numbered figures, then the others."""
    facts = [read_json(path) for path in sorted(folder.glob("*.json"))]
    items = [each for each in facts if "kind" in each]
    return sorted(items, key=lambda each: (each["kind"] != "table", "Figure" not in each["called"]))


def read_section(folder: Path, facts: Mapping[str, Any]) -> Section:
    """An item's section, out of its page."""
    text = (folder / f"{facts['name']}.html").read_text(encoding="utf-8")
    inside = text[text.index(BEGIN) : text.rindex(END) + len(END)]
    return Section(facts["name"], facts["called"], inside)


def page(title: str, sections: Sequence[Section], lead: Sequence[str] = ()) -> str:
    """A whole HTML page that needs no other file; with a `lead`, title and index come first."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(title=title, sections=sections, lead=lead)


def show(item: Item, rendered: Rendered) -> None:
    """Print the item, panel by panel, then the notes."""
    for head, frame in rendered.panels.items():
        show_table(frame, f"{item.title}{': ' if head else ''}{head}")
    show_table(pd.DataFrame({"": list(rendered.notes)}), "")


def _section(item: Item, rendered: Rendered) -> str:
    notes = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in rendered.notes)
    return (
        f'{BEGIN} id="{item.name}">\n<h2>{html.escape(item.title)}</h2>\n'
        f'<div class="wide">{rendered.body}</div>\n{notes}\n{END}'
    )
