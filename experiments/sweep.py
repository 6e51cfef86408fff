"""What a multirun ends with: one table of all its runs, and accuracy against ratio (Figure 7).

Every job leaves `result.json` in its own folder of the multirun: the result's folder, or the
message it failed with. So the summary needs nothing of the jobs' processes, and is made of what
finished also where a job failed or the sweep was interrupted. Files: sweep.csv, table.md, and
plot.png, plot.pdf where some configuration was run at two ratios or more.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from evaluation.files import write_atomically
from experiments.frames import run_settings, tidy
from experiments.rendering import DASH, find_metric, format_interval, show_table, to_markdown
from experiments.results import read_json, write_json

LINK = "result.json"
SCOPES = ("target", "others", "general")
SERIES = ["model", "concept", "edit", "component", "per", "seed", "metric"]

logger = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Hydra callback: notes the multirun's folder, for `finish_sweep` after its last job.

    Not Hydra's `on_multirun_end`: that is left out as soon as one job has raised.
    """

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        for link in folder.glob(f"*/{LINK}"):  # an earlier run of the same command
            link.unlink()
        SweepSummary.folder = folder


def finish_sweep() -> bool:
    """Summarise the multirun that was begun in this process; nothing to do without one.

    Returns whether a job of it failed, in whatever process.
    """
    folder, SweepSummary.folder = SweepSummary.folder, None
    return folder is not None and not summarise(folder)


def note_result(job_folder: Path, result: Path) -> None:
    """Leave a job's link to its result folder in the job's own folder."""
    write_json(job_folder / LINK, {"folder": str(result), "error": None})


def note_failure(job_folder: Path, message: str) -> None:
    """Leave the reason why a job has no result in the job's own folder."""
    write_json(job_folder / LINK, {"folder": None, "error": message})


def summarise(folder: Path) -> bool:
    """Write and print the table of a multirun's results, and plot them if ratios were swept.

    Returns whether all jobs that told of themselves succeeded.
    """
    jobs = [path.parent for path in folder.glob(f"*/{LINK}")]
    links = {job.name: read_json(job / LINK) for job in sorted(jobs, key=_job_number)}
    for job, link in links.items():
        if link["error"] is not None:
            logger.error("run %s of the sweep failed: %s", job, link["error"])
    results = [Path(link["folder"]) for link in links.values() if link["error"] is None]
    if not results:
        return not links
    frame = pd.concat([tidy(result) for result in results], ignore_index=True)
    write_atomically(folder / "sweep.csv", frame.to_csv(index=False).encode())
    table = sweep_table(results)
    write_atomically(folder / "table.md", to_markdown(table).encode())
    show_table(table, f"{len(results)} run{'s' if len(results) > 1 else ''}")
    series = ratio_series(frame)
    if series:
        from experiments.figures.ratios import draw_ratios  # slow to import, and seldom needed
        from experiments.figures.style import save

        for ending, content in save(draw_ratios(series)).items():
            write_atomically(folder / f"plot.{ending}", content)
        logger.info("accuracy against ratio: %s", folder / "plot.png")
    logger.info("sweep folder: %s", folder)
    return len(results) == len(links)


def sweep_table(results: list[Path]) -> pd.DataFrame:
    """One row per run and metric: settings, then its scopes before and after, as text."""
    rows = []
    for result in results:
        metrics = read_json(result / "metrics.json")
        settings = {
            key: DASH if value is None else str(value)
            for key, value in run_settings(metrics).items()
        }
        for name in dict.fromkeys(row["name"] for row in metrics["metrics"]):
            cells = {
                f"{scope} {state}": format_interval(find_metric(metrics, name, scope, state))
                for scope in SCOPES
                for state in ("before", "after")
            }
            rows.append(settings | {"metric": name} | cells)
    table = pd.DataFrame(rows)
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


def _job_number(path: Path) -> tuple[int, str]:
    return (int(path.name), "") if path.name.isdigit() else (-1, path.name)
