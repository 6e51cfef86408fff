"""What edits do that are made from scores of some quality: runs of `run.py`, like any other."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from cad.errors import UserError
from experiments.config import plain
from experiments.frames import tidy
from experiments.items.launch import blocks, launch
from experiments.items.plan import Overrides, State, find_runs

KEY = "edit.attribution"

log = logging.getLogger(__name__)


def measured_effects(config: DictConfig) -> pd.DataFrame:
    """Tidy metrics after the edit, with estimator, samples and round; what is missing is run.

    Raises UserError with the first reason if a run fails.
    """
    wanted = {
        (str(name), int(samples), turn): overrides_of(config, str(name), int(samples), turn)
        for name, counts in config.effects.estimators.items()
        for samples in counts
        for turn in range(config.effects.rounds)
    }
    runs = find_runs(wanted.values())
    missing = [run for run in runs.values() if run.state is State.MISSING]
    refused = [run.reason for run in runs.values() if run.state is State.REFUSED]
    for block in blocks(missing):
        refused += launch(block, Path(config.paths.results) / "sweeps", launcher=None).values()
    if refused:
        raise UserError(f"effects: {refused[0]}")
    frames = []
    for (name, samples, turn), overrides in wanted.items():
        frame = tidy(runs[overrides].folder)
        frames.append(frame.assign(estimator=name, samples=samples, round=turn))
    return pd.concat(frames, ignore_index=True)


def overrides_of(config: DictConfig, name: str, samples: int, turn: int) -> Overrides:
    """The run of `run.py` whose edit is made from such scores."""
    settings = {
        **plain(config.estimators)[name]["settings"],
        "samples": samples,
        "seed": config.seed + turn,
    }
    return (
        f"model={config.model.name}",
        f"concept={config.concept.name}",
        f"edit={config.edit.name}",
        f"seed={config.seed}",
        f"device={config.device}",
        f"dtype={config.dtype}",
        f"paths.results={config.paths.results}",
        f"paths.scores={config.output}/scores",
        "logger=none",
        *config.effects.overrides,
        *(f"{KEY}.{key}={value}" for key, value in settings.items()),
    )
