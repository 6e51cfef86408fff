"""One page of everything that was made."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from tables_fixture import composed_figure, finished_run, row, small_table

from cad.errors import UserError
from experiments.run.command_line import note
from experiments.run.curves import new_canvas, save
from experiments.run.results import read_json, write_json
from experiments.run.sweep import summarise
from experiments.run.wandb_tracking import WandbTracker
from experiments.tables.layout import render_table
from experiments.tables.publishing import Rendering, publish
from experiments.tables.report import SHIPPED, write_report


class Addresses(HTMLParser):
    """The values of a page's attributes, by tag and attribute."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            self.found[tag, key].append(value or "")


def made(folder: Path, runs: Path) -> None:
    """A table of four runs of which one is done, and a figure of none, of the miniature."""
    table = small_table("mini", note="a <note>")
    listed = table.list_runs()
    listed[1] = finished_run(runs, "x", [row(5.0, 1.0, 9.0)], place=listed[1].place)
    publish(table, render_table(table, listed), listed, folder)
    figure = composed_figure("figure7", "mini", fast=True)
    text = f"**{figure.full_title}**\n\n![x]({figure.name}.png)\n\na sentence\n"
    png = save(new_canvas(1, 1))["png"]
    publish(figure, Rendering([], {"png": png, "md": text.encode()}, {}), [], folder)


def test_the_report_holds_every_exhibit_and_needs_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "reproduction"
    made(folder, tmp_path / "runs")
    path = write_report(folder, "mini", tmp_path / "runs", shipped=tmp_path)
    page = path.read_text()
    found = Addresses(page).found
    assert path.name == "report-mini.html"
    assert found["section", "id"] == ["table01-mini", "figure7-mini-fast"]
    assert found["a", "href"] == ["#table01-mini", "#figure7-mini-fast"]
    (picture,) = (value for (_, key), values in found.items() if key == "src" for value in values)
    assert picture.startswith("data:")
    assert ("link", "href") not in found
    assert 'name="viewport"' in page
    assert "Table 1 (1 of 4 runs)" in page
    assert "a &lt;note&gt;" in page
    index = (folder / "README.md").read_text()
    assert "- [Table 1 (1 of 4 runs)](table01-mini.md): accuracy" in index
    assert "- [Figure 7](figure7-mini-fast.md): accuracy against the ratio" in index
    assert "1 tables and 1 figures" in page
    assert "Run 2026-01-02 on a GPU, commit 0123456789ab" in page
    assert "fast versions" in page
    assert "another model" in page
    assert (
        write_report(folder, None, tmp_path, shipped=tmp_path).read_text().count("</section>") == 2
    )


def test_a_clean_clone_reports_what_was_shipped(tmp_path: Path) -> None:
    page = write_report(tmp_path / "reproduction", "mini", tmp_path).read_text()
    names = Addresses(page).found["section", "id"]
    assert set(names) == {path.stem for path in SHIPPED.glob("*-mini.md")}
    assert names[:2] == ["table01-mini", "table02-mini"]
    assert "as they came with the repository" in page
    index = (tmp_path / "reproduction" / "README.md").read_text()
    (link,) = (line for line in index.splitlines() if line.startswith("- [Table 12"))
    target = link.partition("](")[2].partition(")")[0]
    assert (tmp_path / "reproduction" / target).resolve() == SHIPPED / "table12-mini.md"


def own_results(results: Path) -> Path:
    """A report of two runs, with a picture, and a sweep of them."""
    rows = [
        row(95.0, 76.4, 99.1, state="before", groups=1, over="x"),
        row(5.0, 0.9, 23.6, groups=1, over="x"),
    ]
    known = {
        "model": {"name": "mini", "revision": "local", "dtype": "float32"},
        "images": {"concept": {"before": {"folder": "x", "count": 1, "broken": 0}}},
    }
    sweep = results / "sweeps" / "x"
    for concept in ("church", "tench"):
        run = finished_run(results / "runs", concept, rows, concept=concept, **known)
        (run.folder / "before_after.png").write_bytes(save(new_canvas(1, 1))["png"])
        (sweep / concept).mkdir(parents=True)
        note(sweep / concept, run.folder)
    assert summarise(sweep)
    told = "hydra: {overrides: {task: ['concept=church,tench']}}"
    (sweep / "multirun.yaml").write_text(told)
    return write_report(results / "reproduction", "mini", results / "runs")


def test_runs_and_sweeps_of_this_checkout_are_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = finished_run(tmp_path / "runs", "old", []).folder
    metrics = read_json(old / "metrics.json")
    del metrics["edit"]["unit"]
    write_json(old / "metrics.json", metrics)
    page = own_results(tmp_path).read_text()
    assert "old-0 is left out: an older version made it, without 'unit'" in caplog.text
    assert "Runs in this checkout (2)" in page
    assert "CAD-Erase: church" in page
    assert "95.0 → 5.0<small>[0.9, 23.6]</small>" in page
    found = Addresses(page).found
    assert len(found["template", "data-run"]) == 2
    assert "Sweep: concept=church,tench" in page
    assert all(each.startswith("data:image/webp") for each in found["img", "src"])


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
CLICKS = """<script>
for (const box of all("#runs tbody input")) box.click();
one("filter").value = "TENCH"; one("filter").oninput({target: one("filter")});
all("#table01-mini th")[1].click(); one("paper").click(); one("theme").click();
all("#chosen img")[0].click();
</script></body>"""


@pytest.mark.skipif(not BROWSER, reason="no browser here")
def test_in_a_browser_it_compares_filters_sorts_switches_and_zooms(tmp_path: Path) -> None:
    page = own_results(tmp_path)
    page.write_text(page.read_text().replace("</body>", CLICKS))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [BROWSER, *options, "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = Addresses(dom).found
    chosen = dom.partition('<div id="chosen">')[2].partition('<div class="wide"><table><thead>')[0]
    assert dom.count("<article><h3>CAD-Erase") == 2 * 2  # chosen, and their templates
    assert "<article>" in chosen
    rows = dom.partition("<tbody>")[2]
    assert found["tr", "hidden"] == [""]
    assert rows.count("<td title=") == 2
    assert found["th", "aria-sort"] == ["ascending"]
    assert "paper" in found["html", "class"]
    assert found["html", "data-theme"] in (["dark"], ["light"])
    assert found["dialog", "open"] == [""]


def test_without_any_it_names_a_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tables or figures of sd14, .*table=table01"):
        write_report(tmp_path, "sd14", tmp_path)


def test_a_table_is_mirrored_offline_where_the_server_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    logged: dict[str, object] = {}
    told: dict[str, object] = {}

    def init(*, mode: str, **settings: object) -> SimpleNamespace:
        modes.append(mode)
        told.update(settings)
        if mode == "online":
            raise wandb.errors.CommError("no network")
        return SimpleNamespace(log=logged.update, finish=lambda: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    table = small_table("mini")
    listed = table.list_runs()
    rendering = render_table(table, listed)
    paths = publish(table, rendering, listed, tmp_path)
    mirrored = (table.name, rendering.panels, rendering.notes, paths)
    tracker = WandbTracker("cad", "online", 1, str(tmp_path))
    tracker.log_item(*mirrored)
    assert modes == ["online", "offline"]
    assert set(logged) == {"table01-mini accuracy on the class, % ↓", "page"}
    assert (told["id"], told["resume"], told["group"]) == ("table01-mini", "allow", "table01-mini")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker.log_item(*mirrored)
    assert len(modes) == 2
