"""Mirrors of results on this machine: TensorBoard's files, or one CSV file."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cad.errors import UserError
from cad.files import locked, write_atomically
from experiments.run.rendering import run_settings
from experiments.run.results import ResultFolder, read_json, read_lines
from experiments.run.tracking import PICTURES, Tracker, harmless
from experiments.run.values import measured, scalars


class TensorBoardTracker(Tracker):
    """Every result as a run of TensorBoard's, in a folder of its own below `folder`.

    Written anew each time. Raises UserError where the package tensorboard is not installed.
    """

    def __init__(self, folder: str) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("logger=tensorboard needs a package: pip install -e '.[tensorboard]'")
        self.folder = Path(folder)

    @contextmanager
    def follow(self, result: ResultFolder, about: Mapping[str, Any]) -> Iterator[None]:
        yield
        with harmless(result.name):
            from torch.utils.tensorboard import SummaryWriter

            place = self.folder / (about["group"] or "") / result.name
            shutil.rmtree(place, ignore_errors=True)
            with SummaryWriter(str(place)) as writer:
                _write(writer, result.final)


class CsvTracker(Tracker):
    """A file with a line for every value of every result: its settings, interval and conditions."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @contextmanager
    def follow(self, result: ResultFolder, about: Mapping[str, Any]) -> Iterator[None]:
        yield
        with harmless(result.name):
            told = {"result": result.name, "logged_in": about["group"]}
            told |= run_settings(read_json(result.final / "metrics.json"))
            frame = pd.DataFrame([told | row for row in measured(result.final)])
            lock = self.path.with_name(f".{self.path.name}.lock")
            with locked(lock, f"another process is writing {self.path}"):
                if self.path.exists():
                    old = pd.read_csv(self.path)
                    frame = pd.concat([old[old["result"] != result.name], frame])
                write_atomically(self.path, frame.to_csv(index=False).encode())


def _write(writer: Any, folder: Path) -> None:
    """A result's numbers, table and pictures, to a `SummaryWriter`."""
    if (folder / "history.jsonl").exists():
        for step, record in enumerate(read_lines(folder / "history.jsonl")):
            for key, value in record.items():
                writer.add_scalar(f"training/{key}", value, step)
    for key, value in scalars(folder).items():
        writer.add_scalar(key, value)
    writer.add_text("table", (folder / "table.md").read_text(encoding="utf-8"))
    for name in PICTURES:
        if (folder / f"{name}.png").exists():
            with Image.open(folder / f"{name}.png") as picture:
                pixels = np.asarray(picture.convert("RGB"))  # (H, W, 3)
            writer.add_image(name, pixels, dataformats="HWC")
