"""The end of a multirun: one table of all its runs, plots, and their pictures side by side.

Every job leaves `result.json` in its own folder of the multirun: the result's folder, or the
message it failed with. So the summary needs nothing of the jobs' processes, and is made of what
finished also where a job failed. Files: sweep.csv, of every run; table.md, in which runs that
differ in their seeds alone are one row; plot.png, .pdf and .svg where some configuration was run at
two ratios or more; edits.png, .pdf and .svg where a concept was edited by two methods or more;
CONCEPT.png, the pictures of runs on the same images side by side.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cad.files import write_atomically
from experiments.run.command_line import LINK
from experiments.run.curves import draw_edits, draw_ratios, save
from experiments.run.pictures import side_by_side
from experiments.run.rendering import (
    compare_runs,
    display,
    display_words,
    find_metric,
    join_concepts,
    run_settings,
    show_table,
    tidy,
    to_markdown,
)
from experiments.run.results import read_json

UNEDITED = "none"
SERIES = ["model", "concept", "edit", "component", "per", "unit", "seed", "metric"]

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
        rows = over_seeds([read_json(each / "metrics.json") for each in results])
        table, common = compare_runs(rows)
        caption = f"{len(results)} run{'s' if len(results) > 1 else ''}: {common}"
        if len(rows) < len(results):
            caption += "; mean ± standard deviation over seeds"
        write_atomically(folder / "table.md", f"{caption}\n\n{to_markdown(table)}".encode())
        show_table(table.map(lambda cell: cell.replace(" [", "\n[")), caption)
        _draw(frame, folder)
        for name, pictures in shown_together(results).items():
            side_by_side(pictures, folder / f"{name}.png")
            logger.info("side by side: %s", folder / f"{name}.png")
        logger.info("sweep folder: %s", folder)
    return all(link["error"] is None for link in links.values())


def over_seeds(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results' metrics.json, those that differ in their seeds alone as one, with their means.

    Runs that differ in what a row does not tell, so that a seed stands there twice, stay apart.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in results:
        settings = run_settings(each) | {"seed": None}
        groups.setdefault(tuple(settings.values()), []).append(each)
    apart = [len({each["seed"] for each in group}) < len(group) for group in groups.values()]
    if any(apart) or len(groups) == len(results):
        return list(results)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One metrics.json of several; a deviation beside each value that all of them have."""
    if len(group) == 1:
        return group[0]
    rows = []
    for row in group[0]["metrics"]:
        place = (row["name"], row["scope"], row["state"])
        values = [same["value"] for each in group if (same := find_metric(each, *place))]
        if row["scope"] != "group" and len(values) == len(group):
            rows.append(
                row | {"value": statistics.fmean(values), "deviation": statistics.stdev(values)}
            )
    return group[0] | {"seed": ", ".join(str(each["seed"]) for each in group), "metrics": rows}


def _draw(frame: pd.DataFrame, folder: Path) -> None:
    """Write the plots that there is something for."""
    if frame.empty:
        return
    ratios, edits = ratio_series(frame), edit_series(frame)
    drawn = {"plot": draw_ratios(ratios)} if ratios else {}
    drawn |= {"edits": draw_edits(edits)} if edits else {}
    for name, canvas in drawn.items():
        for ending, content in save(canvas).items():
            write_atomically(folder / f"{name}.{ending}", content)
        logger.info("plot: %s", folder / f"{name}.png")


def shown_together(results: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """The pictures of two runs or more on the same images, by concept, then by edit and ratio."""
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for result in results:
        metrics, picture = read_json(result / "metrics.json"), result / "before_after.png"
        if picture.exists():
            ratio = metrics["edit"]["ratio"]
            name = display(metrics["edit"]["name"]) + (f"\n{ratio:g}" if ratio else "")
            made = next(iter(metrics["images"].values()))["before"]["folder"]
            found.setdefault((join_concepts(metrics), made), {})[name] = picture
    most_last = sorted(found.items(), key=lambda each: len(each[1]))
    return {concept: shown for (concept, _), shown in most_last if len(shown) > 1}


def edit_series(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of each concept and metric that two edits or more were run on, once each: what they left."""
    left = frame[(frame["state"] == "after") | (frame["edit"] == UNEDITED)]
    found = {}
    for (concept, metric), group in left.groupby(["concept", "metric"], sort=False):
        if group["edit"].nunique() > 1 and not group.duplicated(["edit", "scope"]).any():
            found[f"{display(str(concept))}: {display_words(str(metric))}"] = group
    return found


def ratio_series(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each configuration that was run at two ratios or more, by its title."""
    found = {}
    varying = [key for key in SERIES if frame[key].nunique() > 1 or key == "concept"]
    for key, group in frame.groupby(SERIES, sort=False, dropna=True):
        if group["ratio"].nunique() > 1:
            names = dict(zip(SERIES, key, strict=True))
            found[", ".join(display(str(names[name])) for name in varying)] = group
    return found
