"""HTML pages that need no other file, out of the markdown and pictures that lie in a folder."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from PIL import Image

from cad.errors import UserError
from experiments.run.rendering import OURS, display, display_words

TITLE = re.compile(r"\A\*\*(.+), (.+?): (.+)\*\*")  # called, models: subject
PICTURE = re.compile(r'src="([^":]+\.png)"')
TABLE = re.compile(r"^\|.*(?:\n\|.*)+", re.MULTILINE)
ONE_WORD = re.compile(r"^[a-z]\w*$")
CELL = re.compile(r"<td.*?</td>")
INTERVAL = re.compile(r" (\[[^\[\]]*\])")
PRINTED = re.compile(r" (\([-\d.,]+\)†?)</td>")  # the paper's value and its mark
WIDTH = 1400  # pixels of the widest picture in a page
QUALITY = 80  # of WebP


@dataclass(frozen=True)
class Section:
    """A table or figure in a page."""

    name: str  # of its files
    called: str
    models: str
    subject: str
    html: str


@dataclass(frozen=True)
class Card:
    """A run in a page: its cells in the table of runs, and what is shown when it is chosen."""

    name: str  # of its folder
    short: str  # what stands in the table
    title: str
    cells: Mapping[str, str]  # by heading, HTML
    html: str


def read_section(path: Path) -> Section:
    """A table or figure out of its markdown, with the pictures that lie beside it."""
    text = path.read_text(encoding="utf-8")
    title = TITLE.match(text)
    if title is None:
        raise UserError(f"{path} is no table or figure: its first line has no title")
    html = to_html(TITLE.sub(r"## \1, \2: \3", text), path.parent)
    return Section(path.stem, title[1], title[2], title[3], html)


def to_html(markdown: str, folder: Path) -> str:
    """Markdown as HTML: pictures of the folder embedded, what stands in a table's cells marked.

    Of methods, the paper's own come first, in columns as in rows.
    """
    text = TABLE.sub(lambda table: _ours_first(table[0]), markdown)
    html = MarkdownIt("js-default").render(text)
    html = CELL.sub(lambda cell: mark(cell[0]), html)
    html = html.replace("<table>", '<div class="wide"><table>').replace(
        "</table>", "</table></div>"
    )
    return PICTURE.sub(lambda found: f'src="{embed(folder / found[1])}"', html)


def mark(cell: str) -> str:
    """The HTML of a cell with its interval and its published value as elements."""
    return INTERVAL.sub(r"<small>\1</small>", PRINTED.sub(r"<i>\1</i></td>", cell))


def embed(picture: Path, width: int = WIDTH) -> str:
    """The address of a picture within the page: WebP of at most this width."""
    buffer = io.BytesIO()
    with Image.open(picture) as image:
        image.thumbnail((width, 20 * width))
        image.convert("RGB").save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(
    title: str, sections: Iterable[Section], lead: Sequence[str] = (), cards: Sequence[Card] = ()
) -> str:
    """A whole HTML page that needs no other file; with a `lead`, title and index come first."""
    return render("page.html.j2", title=title, sections=sections, lead=lead, cards=cards)


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values; those of HTML are escaped."""
    is_page = template.endswith(".html.j2")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=is_page,
        trim_blocks=is_page,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def _ours_first(table: str) -> str:
    """A markdown table with names as people spell them, and our methods before the others."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    heads, rule = [display_words(head) for head in rows[0]], ["---"] * len(rows[0])
    body = [[_row_head(row[0]), *row[1:]] for row in rows[2:]]
    order = sorted(range(1, len(heads)), key=lambda column: not heads[column].startswith(OURS))
    body.sort(key=lambda row: not row[0].startswith(OURS))
    lines = [[row[column] for column in (0, *order)] for row in (heads, rule, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row_head(text: str) -> str:
    return display(text) if ONE_WORD.match(text) else display_words(text)
