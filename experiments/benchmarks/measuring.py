"""What the benchmarks share: how they time, and the files they write."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.benchmark import Measurement, Timer
from tqdm import tqdm

from cad.files import write_atomically
from experiments.run.rendering import to_markdown
from experiments.run.results import describe_environment, write_json


def timer(task: Callable[[], object]) -> Timer:
    """A timer of `task` that waits for the GPU and computes with as many threads as the rest."""
    return Timer("task()", globals={"task": task}, num_threads=torch.get_num_threads())


def take_turns(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Measurement]:
    """Measure every task once in each round, so that other load on the machine meets them all.

    Each measurement follows a call of the task that warms up and is not counted.
    """
    timers = {name: timer(task) for name, task in tasks.items()}
    measured: dict[str, list[Measurement]] = {name: [] for name in tasks}
    for _ in tqdm(range(rounds), "rounds", unit="round", leave=False, disable=None):
        for name, each in timers.items():
            measured[name].append(each.blocked_autorange(min_run_time=0.0))
    return {name: Measurement.merge(each)[0] for name, each in measured.items()}


def write_benchmark(
    path: Path,
    caption: str,
    rows: Sequence[Mapping[Any, Any]],
    table: pd.DataFrame,
    device: torch.device | str,
) -> None:
    """Write `<path>.json`: caption, rows and environment; `<path>.md`: the same for people.

    `rows` are all that was measured, `table` is what is shown of it.
    """
    environment = describe_environment(str(device))
    environment["load"] = os.getloadavg()[0]  # of the last minute, this benchmark included
    measured = {"caption": caption, "rows": list(rows), "environment": environment}
    write_json(path.with_suffix(".json"), measured)
    conditions = (
        f"{environment['device_name']} ({device}), {environment['threads']} threads, load "
        f"{environment['load']:.1f}, commit {environment['commit'][:12]}, "
        f"{environment['finished'][:10]}."
    )
    text = f"{caption}. {conditions}\n\n{to_markdown(table)}"
    write_atomically(path.with_suffix(".md"), text.encode())
