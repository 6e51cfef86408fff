"""What all benchmarks share: how they time, and what they write."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from evaluation.files import write_atomically
from experiments.environment import describe_environment
from experiments.rendering import to_markdown
from experiments.results import write_json


def alternate(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task in each round, after one call of each that is not counted.

    The tasks take turns, so that whatever else the machine does meets them all.
    """
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in tqdm(range(rounds), "rounds", unit="round", leave=False, disable=None):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each task's rounds."""
    return {name: statistics.median(each) for name, each in seconds.items()}


def write_benchmark(
    folder: Path,
    name: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    device: torch.device,
    table: pd.DataFrame,
) -> None:
    """NAME.json with caption, rows and environment; NAME.md with caption, conditions and table.

    `rows` are all that was measured, `table` what of it is shown.
    """
    environment = describe_environment(str(device))
    environment["load"] = os.getloadavg()[0]  # of the last minute, this benchmark counted
    measured = {"caption": caption, "rows": list(rows), "environment": environment}
    write_json(folder / f"{name}.json", measured)
    conditions = (
        f"{environment['device_name']} ({device.type}), {environment['threads']} threads, load "
        f"{environment['load']:.1f}, commit {environment['commit'][:12]}, "
        f"{environment['finished'][:10]}."
    )
    text = f"{caption}. {conditions}\n\n{to_markdown(table)}"
    write_atomically(folder / f"{name}.md", text.encode())
