"""One page of everything that was made."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from tables_fixture import compose_tables, finished_run, row, small_table

from cad.errors import UserError
from experiments.config import REPOSITORY
from experiments.figures.figure import read_figure
from experiments.items.plan import Run, State
from experiments.items.publishing import Rendered, publish, published
from experiments.report import lead, write_report
from experiments.tables.cells import build_cells
from experiments.tables.paper import Published
from experiments.tables.rendering import render_table


class Addresses(HTMLParser):
    """What a page refers to, and its sections."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.sections: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.outside += [values[key] for key in ("src",) if key in values]
        if tag == "link":
            self.outside.append(values["href"])
        if tag == "a":
            self.links.append(values["href"])
        if tag == "section":
            self.sections.append(values["id"])


def made(folder: Path, runs: Path) -> None:
    """A table of four runs of which one is done, and a figure of none, of the miniature."""
    table = small_table("mini")
    pairs = []
    for place in table.sweep.places():
        run = Run(tuple(place.values()), State.MISSING)
        if (place["concept"], place["edit"]) == ("church", "erase"):
            run = finished_run(runs, "x", [row(5.0, 1.0, 9.0)])
        pairs.append((place, run))
    cells = build_cells(table, pairs, Published(REPOSITORY / "results" / "paper", 1))
    rendered = render_table(table, cells, ["a <note>"])
    publish(table, rendered, [run for _, run in pairs], folder)
    figure = read_figure(compose_tables("figure=figure7").figure, "mini", True)
    panels: dict[str, pd.DataFrame] = {}
    picture = Rendered([], '<img src="data:image/png;base64,AA==">', {"md": b"x"}, panels)
    publish(figure, picture, [], folder)


def test_the_report_holds_every_item_and_needs_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "reproduction"
    made(folder, tmp_path / "runs")
    path = write_report(folder, "mini")
    page = path.read_text()
    found = Addresses()
    found.feed(page)
    assert path.name == "report-mini.html"
    assert found.sections == ["table01-mini", "figure7-mini-fast"]
    assert found.links == [f"#{name}" for name in found.sections]
    assert all(address.startswith("data:") for address in found.outside)
    assert 'name="viewport"' in page
    assert "Table 1 (1 of 4 runs)" in page
    assert "a &lt;note&gt;" in page
    assert page.count("</section>") == 2
    index = (folder / "README.md").read_text()
    assert "- [Table 1 (1 of 4 runs)](table01-mini.md): accuracy" in index
    assert "- [Figure 7](figure7-mini-fast.md): accuracy against the ratio" in index
    assert write_report(folder, None).read_text().count("</section>") == 2  # and not itself


def test_the_first_paragraph_says_what_was_run_on_what_and_when(tmp_path: Path) -> None:
    made(tmp_path, tmp_path / "runs")
    first, differs = lead(published(tmp_path))
    assert "1 tables and 1 figures" in first
    assert "1 are done, 3 are still to be run" in first
    assert "Run 2026-01-02 on a GPU, commit 0123456789ab" in first
    assert "fast versions" in first
    assert "another model" in differs


def test_without_items_it_names_a_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tables or figures of sd14: .*make table1"):
        write_report(tmp_path, "sd14")
