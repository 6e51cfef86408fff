"""One page of everything that was made."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import wandb
from tables_fixture import composed_figure, finished_run, row, small_table

from cad.errors import UserError
from experiments.run.tracking import NoTracker, WandbTracker
from experiments.tables.layout import render_table
from experiments.tables.publishing import Rendering, publish
from experiments.tables.report import SHIPPED, write_report


class Addresses(HTMLParser):
    """The addresses in a page, and its sections."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.sections: list[str] = []
        self.links: list[str] = []
        self.feed(page)

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
    table = small_table("mini", note="a <note>")
    listed = table.list_runs()
    listed[1] = finished_run(runs, "x", [row(5.0, 1.0, 9.0)], place=listed[1].place)
    publish(table, render_table(table, listed), listed, folder)
    figure = composed_figure("figure7", "mini", fast=True)
    text = f"**{figure.full_title}**\n\n![x]({figure.name}.png)\n\na sentence\n"
    publish(figure, Rendering([], {"png": b"PNG", "md": text.encode()}, {}), [], folder)


def test_the_report_holds_every_exhibit_and_needs_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "reproduction"
    made(folder, tmp_path / "runs")
    path = write_report(folder, "mini", shipped=tmp_path)
    page = path.read_text()
    found = Addresses(page)
    assert path.name == "report-mini.html"
    assert found.sections == ["table01-mini", "figure7-mini-fast"]
    assert found.links == [f"#{name}" for name in found.sections]
    assert len(found.outside) == 1
    assert all(address.startswith("data:") for address in found.outside)
    assert 'name="viewport"' in page
    assert "Table 1 (1 of 4 runs)" in page
    assert "a &lt;note&gt;" in page
    index = (folder / "README.md").read_text()
    assert "- [Table 1 (1 of 4 runs)](table01-mini.md): accuracy" in index
    assert "- [Figure 7](figure7-mini-fast.md): accuracy against the ratio" in index
    assert "1 tables and 1 figures" in page
    assert "1 are done, 3 are still to be run" in page
    assert "Run 2026-01-02 on a GPU, commit 0123456789ab" in page
    assert "fast versions" in page
    assert "another model" in page
    assert write_report(folder, None, shipped=tmp_path).read_text().count("</section>") == 2


def test_a_clean_clone_reports_what_was_shipped(tmp_path: Path) -> None:
    page = write_report(tmp_path / "reproduction", "mini").read_text()
    names = Addresses(page).sections
    assert set(names) == {path.stem for path in SHIPPED.glob("*-mini.md")}
    assert names[:2] == ["table01-mini", "table02-mini"]
    assert "as they came with the repository" in page
    index = (tmp_path / "reproduction" / "README.md").read_text()
    (link,) = (line for line in index.splitlines() if line.startswith("- [Table 12"))
    target = link.partition("](")[2].partition(")")[0]
    assert (tmp_path / "reproduction" / target).resolve() == SHIPPED / "table12-mini.md"


def test_without_any_it_names_a_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tables or figures of sd14: .*table=table01"):
        write_report(tmp_path, "sd14")


class FakeRun:
    """A run of W&B that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: dict[str, object] = {}

    def log(self, values: dict[str, object]) -> None:
        self.logged |= values

    def finish(self) -> None:
        return None


def test_a_table_is_mirrored_offline_where_the_server_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    run = FakeRun()

    def init(*, mode: str, **settings: object) -> FakeRun:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no network")
        return run

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    table = small_table("mini")
    listed = table.list_runs()
    rendering = render_table(table, listed)
    paths = publish(table, rendering, listed, tmp_path)
    mirrored = (table.name, rendering.panels, rendering.notes, paths, tmp_path)
    tracker = WandbTracker("cad", "online", 1)
    tracker.log_item(*mirrored)
    assert modes == ["online", "offline"]
    assert set(run.logged) == {"table01-mini accuracy on the class, % ↓", "page"}
    NoTracker().log_item(*mirrored)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker.log_item(*mirrored)
    assert len(modes) == 2
