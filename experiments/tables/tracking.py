"""A rendered table mirrored to Weights & Biases, by the logger that runs have."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiments.tracking import FOLDER, Mode, Tracker, WandbTracker

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)


def log_table(
    tracker: Tracker,
    name: str,
    panels: Mapping[str, pd.DataFrame],
    notes: Sequence[str],
    page: Path,
    folder: Path,
) -> None:
    """Mirror a table: its panels as W&B Tables, and its HTML `page`. Other trackers show nothing.

    W&B's files go into `folder`. What keeps the mirror from being made is logged, not raised.
    """
    if isinstance(tracker, WandbTracker) and os.environ.get("WANDB_MODE") != "disabled":
        TableTracker(tracker.project, tracker.mode, tracker.timeout).log_table(
            name, panels, notes, page, folder
        )


class TableTracker(WandbTracker):
    """One W&B run for each rendering of a table."""

    def log_table(
        self,
        name: str,
        panels: Mapping[str, pd.DataFrame],
        notes: Sequence[str],
        page: Path,
        folder: Path,
    ) -> None:
        """As the function of this name."""
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_DATA_DIR"] = str(folder / FOLDER)  # else staged files go to the home
        import wandb

        try:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            with self._open(name, notes, folder) as run:
                for head, frame in panels.items():
                    run.log({" ".join([name, head]).strip(): wandb.Table(dataframe=frame)})
                run.log({"page": wandb.Html(page.read_text(encoding="utf-8"))})
        except (wandb.errors.Error, OSError) as error:
            logger.warning("W&B logging of %s skipped (%s); its files are complete", name, error)

    def _open(self, name: str, notes: Sequence[str], folder: Path) -> wandb.Run:
        """A W&B run, offline where the server cannot be reached."""
        import wandb

        def start(mode: Mode) -> wandb.Run:
            return wandb.init(
                project=self.project,
                name=name,
                job_type="table",
                notes="\n".join(notes),
                dir=str(folder),
                mode=mode,
                reinit="finish_previous",
                settings=wandb.Settings(init_timeout=self.timeout, silent=True, console="off"),
            )

        try:
            return start(self._choose_mode())
        except wandb.errors.Error as error:
            logger.warning("W&B cannot be reached, logging offline (%s)", error)
            return start("offline")
