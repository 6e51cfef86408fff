"""What the training stages share: the work folder, the data, the device, the report."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cad.errors import UserError
from cad.files import write_atomically
from cad.identity import short_digest
from experiments.miniature.data import Photographs, load_photographs
from experiments.miniature.training import SITTINGS_FILE
from experiments.run.results import read_json

log = logging.getLogger(__name__)

MADE_FROM_FILE = "made_from.json"
INPUTS: dict[str, tuple[str, ...]] = {  # the stages whose results a stage starts from
    "classifier": (),
    "judge": ("classifier",),
    "clip": (),
    "autoencoder": ("classifier",),
    "latents": ("classifier", "autoencoder"),
    "denoiser": ("clip", "latents"),
    "export": ("judge", "clip", "autoencoder", "latents", "denoiser"),
}

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
        """Whether the stage was finished with these very settings, from what there is now."""
        entry = self.reported().get(stage)
        return (
            entry is not None
            and entry["settings"] == settings
            and self._begun_from(stage) == self._inputs(stage)
        )

    def begin(self, stage: str) -> None:
        """Note what the stage is made from, before its first step.

        Raises UserError if an earlier stage is not finished, or if this one was begun from other
        results than there are now: its checkpoint does not fit them.
        """
        missing = [name for name in INPUTS[stage] if name not in self.reported()]
        if missing:
            raise UserError(f"stages: {stage} needs {', '.join(missing)} first")
        inputs, begun = self._inputs(stage), self._begun_from(stage)
        if begun is not None and begun != inputs:
            raise UserError(
                f"{self.stage(stage)} was begun from other results of {', '.join(INPUTS[stage])} "
                "than there are now; delete it to do this stage anew"
            )
        write_atomically(self.stage(stage) / MADE_FROM_FILE, json.dumps(inputs).encode())

    def _inputs(self, stage: str) -> dict[str, str]:
        """What names the present results that the stage starts from."""
        reported = self.reported()
        return {name: short_digest(reported[name]) for name in INPUTS[stage] if name in reported}

    def _begun_from(self, stage: str) -> dict[str, str] | None:
        path = self.folder / stage / MADE_FROM_FILE
        if not path.exists():
            return None
        begun: dict[str, str] = read_json(path)
        return begun

    def report(self, stage: str, settings: Any, figures: dict[str, Any]) -> None:
        """Enter a finished stage in report.json."""
        report = self.reported()
        report[stage] = {"settings": settings, **figures}
        sittings = self.folder / stage / SITTINGS_FILE
        if sittings.exists():
            lines = sittings.read_text().splitlines()
            report[stage]["sittings"] = [json.loads(line) for line in lines]
        write_atomically(self.report_file, (json.dumps(report, indent=2) + "\n").encode())
        log.info("%s done: %s", stage, figures)

    def reported(self) -> dict[str, dict[str, Any]]:
        """Settings and figures of the finished stages."""
        if not self.report_file.exists():
            return {}
        report: dict[str, dict[str, Any]] = read_json(self.report_file)
        return report
