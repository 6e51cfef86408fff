"""Mirrors of finished results, tables and figures in Weights & Biases.

It keeps its own files in the folder's wandb/. A run does not fail because of it: its errors and
those of the disk become warnings.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import OmegaConf

from cad.errors import UserError
from experiments.run.rendering import result_table
from experiments.run.results import read_json, read_lines, write_json

if TYPE_CHECKING:
    import wandb

FOLDER = "wandb"  # W&B's files, inside the result folder
HOST = "api.wandb.ai"
MARKER = "mirrored.json"  # in FOLDER; written when everything was sent
PICTURES = ("before_after", "attack")
MODES = ("auto", "online", "offline")

logger = logging.getLogger(__name__)


class Tracker:
    """Shows a finished result elsewhere; this one nowhere.

    It changes none of the result's files. What keeps it from its work is logged, not raised: a run
    does not fail because of it.
    """

    def log(self, folder: Path) -> None:
        """Mirror the result in `folder`, unless that was done before."""

    def log_item(
        self,
        name: str,
        panels: Mapping[str, pd.DataFrame],
        notes: Sequence[str],
        paths: Mapping[str, Path],
        folder: Path,
    ) -> None:
        """Mirror a table or figure of the paper at every call: its panels by heading, its files.

        `paths` has the files by ending: its page "html", a figure's picture "png". The tracker's
        own files go into `folder`.
        """


class WandbTracker(Tracker):
    """One W&B run per result, of its configuration, metrics, table and picture, or per item of the
    paper.

    `mode` "auto" follows the environment's WANDB_MODE, else is online where a key is set and
    offline elsewhere; WANDB_MODE=disabled switches every mode off. `timeout` is in seconds. Raises
    UserError for another mode. What was interrupted before its end is sent again, as a new run.
    """

    def __init__(self, project: str, mode: str, timeout: float) -> None:
        if mode not in MODES:
            raise UserError(f"logger.mode={mode} is not allowed; choose one of {', '.join(MODES)}")
        self.project = project
        self.mode = mode
        self.timeout = timeout

    def log(self, folder: Path) -> None:
        marker = folder / FOLDER / MARKER
        if marker.exists():
            return

        def send(run: wandb.Run) -> None:
            _send_result(run, folder)
            run.finish()
            write_json(marker, {"run": run.id, "mode": run.settings.mode})

        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        self._mirror(folder, send, name=folder.name, config=config)

    def log_item(
        self,
        name: str,
        panels: Mapping[str, pd.DataFrame],
        notes: Sequence[str],
        paths: Mapping[str, Path],
        folder: Path,
    ) -> None:
        def send(run: wandb.Run) -> None:
            import wandb

            for head, frame in panels.items():
                run.log({" ".join([name, head]).strip(): wandb.Table(dataframe=frame)})
            run.log({"page": wandb.Html(paths["html"].read_text(encoding="utf-8"))})
            if "png" in paths:
                run.log({name: wandb.Image(str(paths["png"]))})
            run.finish()

        told = {"name": name, "job_type": "reproduction", "notes": "\n".join(notes)}
        self._mirror(folder, send, **told)

    def _mirror(self, folder: Path, send: Callable[[wandb.Run], None], **told: Any) -> None:
        """Start a run and `send` what is to be seen; offline where the server cannot be reached."""
        if os.environ.get("WANDB_MODE") == "disabled":
            return
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_DATA_DIR"] = str(folder / FOLDER)  # else staged files go to the home
        import wandb

        try:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            try:
                run = self._start(folder, self.mode, told)
            except wandb.errors.Error as error:
                logger.warning("W&B cannot be reached, logging offline (%s)", error)
                run = self._start(folder, "offline", told)
            send(run)
        except (wandb.errors.Error, OSError, ValueError) as error:
            logger.warning("W&B logging of %s skipped (%s); its files are complete", folder, error)
            _abandon()

    def _start(self, folder: Path, wish: str, told: Mapping[str, Any]) -> wandb.Run:
        import wandb

        wish = os.environ.get("WANDB_MODE", "auto") if wish == "auto" else wish
        online = _has_key() if wish == "auto" else wish == "online"

        return wandb.init(
            project=self.project,
            dir=str(folder),
            mode="online" if online else "offline",
            reinit="finish_previous",
            settings=wandb.Settings(init_timeout=self.timeout, silent=True, console="off"),
            **told,
        )


def _send_result(run: wandb.Run, folder: Path) -> None:
    import wandb

    metrics, cost = read_json(folder / "metrics.json"), read_json(folder / "cost.json")
    values: dict[str, Any] = {
        f"{row['name']}/{row['scope']}/{row['state']}": row["value"]
        for row in metrics["metrics"]
        if row["scope"] != "group"
    }
    values |= {"cost/seconds": cost["seconds"], "cost/peak_memory_mb": cost["peak_memory_mb"]}
    values["edit/num_weights"] = metrics["edit"]["num_weights"]
    if metrics["effect"] is not None:
        values["effect/pearson_r"] = metrics["effect"]["pearson_r"]
    values["table"] = wandb.Table(dataframe=result_table(metrics, cost))
    for name in PICTURES:
        if (folder / f"{name}.png").exists():
            values[name] = wandb.Image(str(folder / f"{name}.png"))
    if (folder / "history.jsonl").exists():
        for record in read_lines(folder / "history.jsonl"):
            run.log({f"training/{key}": value for key, value in record.items()})
        values["training"] = wandb.Image(str(folder / "training.png"))
    run.log(values)


def _abandon() -> None:
    """End a W&B run that failed, so that the next job of a sweep gets one of its own."""
    import wandb

    try:
        wandb.finish(exit_code=1)
    except (wandb.errors.Error, OSError) as error:
        logger.warning("W&B could not end its run (%s)", error)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
