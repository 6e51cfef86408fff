"""The end of a multirun: one table of all its runs, and accuracy against ratio (Figure 7).

Every job leaves `result.json` in its own folder of the multirun: the result's folder, or the
message it failed with. So the summary needs nothing of the jobs' processes, and is made of what
finished also where a job failed. Files: sweep.csv, table.md, and plot.png, plot.pdf where some
configuration was run at two ratios or more.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from cad.files import write_atomically
from experiments.run.command_line import LINK
from experiments.run.curves import draw_ratios, save
from experiments.run.rendering import (
    DASH,
    find_metric,
    format_interval,
    run_settings,
    show_table,
    tidy,
    to_markdown,
)
from experiments.run.results import read_json

SCOPES = ("target", "others", "general")
SERIES = ["model", "concept", "edit", "component", "per", "unit", "seed", "metric"]
SETTINGS = {*SERIES, "ratio"}  # shown where runs differ in them

logger = logging.getLogger(__name__)


def summarise(folder: Path) -> bool:
    """Write and print the table of a multirun's results, and plot them if ratios were swept.

    Returns whether all jobs that told of themselves succeeded.
    """
    links = {path.parent.name: read_json(path) for path in folder.glob(f"*/{LINK}")}
    results = []
    for job in sorted(links, key=lambda name: (int(name) if name.isdigit() else -1, name)):
        if links[job]["error"] is not None:
            logger.error("run %s of the sweep failed: %s", job, links[job]["error"])
        elif links[job]["folder"] is not None:
            results.append(Path(links[job]["folder"]))
    if results:
        frame = pd.concat([tidy(result) for result in results], ignore_index=True)
        write_atomically(folder / "sweep.csv", frame.to_csv(index=False).encode())
        table = sweep_table(results)
        write_atomically(folder / "table.md", to_markdown(table).encode())
        told = [key for key in table if key not in SETTINGS or table[key].nunique() > 1]
        show_table(table[told], f"{len(results)} run{'s' if len(results) > 1 else ''}")
        series = ratio_series(frame)
        for ending, content in (save(draw_ratios(series)) if series else {}).items():
            write_atomically(folder / f"plot.{ending}", content)
            logger.info("accuracy against ratio: %s", folder / f"plot.{ending}")
        logger.info("sweep folder: %s", folder)
    return all(link["error"] is None for link in links.values())


def sweep_table(results: list[Path]) -> pd.DataFrame:
    """One row per run and metric: settings, then its scopes before and after, as text."""
    rows = []
    for result in results:
        metrics = read_json(result / "metrics.json")
        for name in dict.fromkeys(row["name"] for row in metrics["metrics"]):
            cells = {
                f"{scope} {state}": format_interval(find_metric(metrics, name, scope, state))
                for scope in SCOPES
                for state in ("before", "after")
            }
            rows.append(run_settings(metrics) | {"metric": name} | cells)
    table = pd.DataFrame(rows).astype(object).fillna(DASH).astype(str)
    unused = [name for name in table if (table[name] == DASH).all() and "general" in str(name)]
    return table.drop(columns=unused)


def ratio_series(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each configuration that was run at two ratios or more, by its title."""
    if frame.empty:
        return {}
    found = {}
    varying = [key for key in SERIES if frame[key].nunique() > 1 or key == "concept"]
    for key, group in frame.groupby(SERIES, sort=False, dropna=True):
        if group["ratio"].nunique() > 1:
            names = dict(zip(SERIES, key, strict=True))
            found[", ".join(str(names[name]).replace("_", " ") for name in varying)] = group
    return found
