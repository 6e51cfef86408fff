"""Mirrors of a finished result, or of a table or figure: Weights & Biases, or nothing.

A tracker is given a finished result folder and changes none of its files; W&B keeps its own in the
folder's wandb/. A run does not fail because W&B cannot be reached: its errors and those of the disk
become warnings.
"""

from __future__ import annotations

import logging
import netrc
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from cad.errors import UserError
from experiments.rendering import result_table
from experiments.results import read_json, read_lines, write_json

if TYPE_CHECKING:
    import pandas as pd
    import wandb

FOLDER = "wandb"  # W&B's files, inside the result folder
HOST = "api.wandb.ai"
MARKER = "mirrored.json"  # in FOLDER; written when everything was sent
PICTURES = ("before_after", "attack")
MODES = ("auto", "online", "offline")
Mode = Literal["online", "offline"]

logger = logging.getLogger(__name__)


class Tracker(ABC):
    """Shows a finished result elsewhere."""

    @abstractmethod
    def log(self, folder: Path) -> None:
        """Mirror the result in `folder`, unless that was done before.

        What keeps the mirror from being made is logged, not raised.
        """

    @abstractmethod
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
        own files go into `folder`. Errors as in `log`.
        """


class NoTracker(Tracker):
    """Shows nothing."""

    def log(self, folder: Path) -> None:
        return None

    def log_item(
        self,
        name: str,
        panels: Mapping[str, pd.DataFrame],
        notes: Sequence[str],
        paths: Mapping[str, Path],
        folder: Path,
    ) -> None:
        return None


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
        if marker.exists() or _is_disabled():
            return
        import wandb

        try:
            run, mode = self._start(folder, name=folder.name, config=_config(folder))
            _send(run, folder)
            wandb.finish()
            write_json(marker, {"run": run.id, "mode": mode})
        except (wandb.errors.Error, OSError) as error:
            logger.warning("W&B logging skipped (%s); the result folder is complete", error)
            _abandon()

    def log_item(
        self,
        name: str,
        panels: Mapping[str, pd.DataFrame],
        notes: Sequence[str],
        paths: Mapping[str, Path],
        folder: Path,
    ) -> None:
        if _is_disabled():
            return
        import wandb

        try:
            run, _ = self._start(folder, name=name, job_type="reproduction", notes="\n".join(notes))
            with run:
                for head, frame in panels.items():
                    run.log({" ".join([name, head]).strip(): wandb.Table(dataframe=frame)})
                run.log({"page": wandb.Html(paths["html"].read_text(encoding="utf-8"))})
                if "png" in paths:
                    run.log({name: wandb.Image(str(paths["png"]))})
        except (wandb.errors.Error, OSError) as error:
            logger.warning("W&B logging of %s skipped (%s); its files are complete", name, error)
            _abandon()

    def _choose_mode(self) -> Mode:
        wish = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        online = _has_key() if wish == "auto" else wish == "online"
        return "online" if online else "offline"

    def _start(self, folder: Path, **told: Any) -> tuple[wandb.Run, Mode]:
        """A W&B run with its files in the folder, offline where the server cannot be reached."""
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_DATA_DIR"] = str(folder / FOLDER)  # else staged files go to the home
        import wandb

        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        mode = self._choose_mode()
        try:
            return self._init(folder, mode, told), mode
        except wandb.errors.Error as error:
            logger.warning("W&B cannot be reached, logging offline (%s)", error)
            return self._init(folder, "offline", told), "offline"

    def _init(self, folder: Path, mode: Mode, told: Mapping[str, Any]) -> wandb.Run:
        import wandb

        return wandb.init(
            project=self.project,
            dir=str(folder),
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(init_timeout=self.timeout, silent=True, console="off"),
            **told,
        )


def _is_disabled() -> bool:
    """Whether the environment switches W&B off."""
    return os.environ.get("WANDB_MODE") == "disabled"


def _send(run: wandb.Run, folder: Path) -> None:
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


def _config(folder: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
