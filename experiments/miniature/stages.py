"""What the training stages share: the work folder, the data, the device, the report."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from experiments.miniature.data import Photographs, load_photographs
from experiments.miniature.training import SITTINGS_FILE

log = logging.getLogger(__name__)

Placeable = TypeVar("Placeable", bound=Tensor | nn.Module)


class Workshop:
    """The training's work folder and what every stage needs from outside it.

    Each stage owns one subfolder: its checkpoint while it trains, its result when it is done.
    """

    def __init__(
        self, folder: Path, parquet: str | None, cache_folder: Path, seed: int, device: str
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.device = torch.device(device)
        self._parquet = parquet
        self._cache_folder = cache_folder
        self._splits = cache(lambda: load_photographs(self._parquet, self._cache_folder))

    def stage(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def photographs(self, split: str) -> Photographs:
        return self._splits()[split]

    def place(self, thing: Placeable) -> Placeable:
        return cast(Placeable, thing.to(self.device))

    @property
    def report_file(self) -> Path:
        return self.folder / "report.json"

    def is_done(self, stage: str, settings: Any) -> bool:
        """Whether the stage was finished with these very settings."""
        entry = self.reported().get(stage)
        return entry is not None and entry["settings"] == settings

    def report(self, stage: str, settings: Any, figures: dict[str, Any]) -> None:
        """Enter a finished stage in report.json."""
        report = self.reported()
        report[stage] = {"settings": settings, **figures}
        sittings = self.folder / stage / SITTINGS_FILE
        if sittings.exists():
            lines = sittings.read_text().splitlines()
            report[stage]["sittings"] = [json.loads(line) for line in lines]
        temporary = self.report_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        temporary.replace(self.report_file)
        log.info("%s done: %s", stage, figures)

    def reported(self) -> dict[str, dict[str, Any]]:
        """Settings and figures of the finished stages."""
        if not self.report_file.exists():
            return {}
        report: dict[str, dict[str, Any]] = json.loads(self.report_file.read_text())
        return report
