"""Mirrors of results, tables and figures in Weights & Biases."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cad.errors import UserError
from experiments.run.rendering import result_table
from experiments.run.results import EDIT, ResultFolder, read_json, read_lines, write_json
from experiments.run.tracking import PICTURES, Tracker, harmless
from experiments.run.values import scalars

if TYPE_CHECKING:
    import wandb

HOST = "api.wandb.ai"
MARKER = "wandb/mirrored.json"  # in a result folder; written when everything was sent
MODES = ("auto", "online", "offline")

logger = logging.getLogger(__name__)


class WandbTracker(Tracker):
    """One W&B run per result, which lasts as long as the work, or per item of the paper.

    A run's id is the result's identity, or the item's name: what was interrupted, or is sent again,
    goes on in the same run. `mode` "auto" follows the environment's WANDB_MODE, else is online
    where a key is set and offline elsewhere; WANDB_MODE=disabled switches every mode off. `timeout`
    is in seconds. W&B's own files are in `folder`/wandb. Raises UserError for another mode.
    """

    def __init__(self, project: str, mode: str, timeout: float, folder: str) -> None:
        if mode not in MODES:
            raise UserError(f"logger.mode={mode} is not allowed; choose one of {', '.join(MODES)}")
        self.project = project
        self.mode = mode
        self.timeout = timeout
        self.folder = Path(folder)

    @contextmanager
    def follow(self, result: ResultFolder, about: Mapping[str, Any]) -> Iterator[None]:
        marker = result.final / MARKER
        run = None if marker.exists() else self._start(result.digest, name=result.name, **about)
        try:
            yield
        except BaseException:
            if run is not None:
                _end(run, result.name, exit_code=1)
            raise
        if run is not None and _send(run, result.name, partial(_send_result, result.final)):
            with harmless(result.name):
                write_json(marker, {"run": run.id, "mode": run.settings.mode})

    def log_item(
        self,
        name: str,
        panels: Mapping[str, pd.DataFrame],
        notes: Sequence[str],
        paths: Mapping[str, Path],
    ) -> None:
        def send(run: wandb.Run) -> None:
            import wandb

            for head, frame in panels.items():
                run.log({" ".join([name, head]).strip(): wandb.Table(dataframe=frame)})
            run.log({"page": wandb.Html(paths["html"].read_text(encoding="utf-8"))})
            if "png" in paths:
                run.log({name: wandb.Image(str(paths["png"]))})

        told = {"name": name, "group": name, "job_type": "reproduction", "notes": "\n".join(notes)}
        run = self._start(name, **told)
        if run is not None:
            _send(run, name, send)

    def _start(self, identity: str, **told: Any) -> wandb.Run | None:
        """A run, offline where the server cannot be reached; None where there can be none."""
        if os.environ.get("WANDB_MODE") == "disabled":
            return None
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_DATA_DIR"] = str(self.folder / "wandb")  # else staged files go home
        run: wandb.Run | None = None
        with harmless(told["name"]):
            import wandb

            self.folder.mkdir(parents=True, exist_ok=True)
            start = partial(
                wandb.init,
                project=self.project,
                id=identity,
                resume="allow",
                dir=str(self.folder),
                reinit="finish_previous",
                settings=wandb.Settings(init_timeout=self.timeout, silent=True, console="off"),
                **told,
            )
            try:
                run = start(mode="online" if self._is_online() else "offline")
            except wandb.errors.Error as error:
                logger.warning("W&B cannot be reached, logging offline (%s)", error)
                run = start(mode="offline")
        return run

    def _is_online(self) -> bool:
        wish = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        return _has_key() if wish == "auto" else wish == "online"


def _send(run: wandb.Run, name: str, send: Callable[[wandb.Run], None]) -> bool:
    """Send what is to be seen and end the run. Returns whether all of it was sent."""
    sent = False
    with harmless(name):
        send(run)
        run.finish()
        sent = True
    if not sent:
        _end(run, name, exit_code=1)
    return sent


def _end(run: wandb.Run, name: str, exit_code: int) -> None:
    """End the run, so that the next one gets one of its own."""
    with harmless(name):
        run.finish(exit_code=exit_code)


def _send_result(folder: Path, run: wandb.Run) -> None:
    import wandb

    metrics, cost = read_json(folder / "metrics.json"), read_json(folder / "cost.json")
    if (folder / EDIT).exists():
        told = {key: value for key, value in metrics["edit"].items() if key != "weights"}
        edit = wandb.Artifact(f"edit-{run.id}", type="edit", metadata=told)
        edit.add_file(str(folder / EDIT), policy="immutable", skip_cache=True)  # makes no copies
        run.log_artifact(edit)
    if (folder / "history.jsonl").exists():
        for record in read_lines(folder / "history.jsonl"):
            run.log({f"training/{key}": value for key, value in record.items()})
    values: dict[str, Any] = dict(scalars(folder))
    values["table"] = wandb.Table(dataframe=result_table(metrics, cost))
    for name in PICTURES:
        if (folder / f"{name}.png").exists():
            values[name] = wandb.Image(str(folder / f"{name}.png"))
    run.log(values)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
