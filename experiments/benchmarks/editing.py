"""The cost of editing: time and peak memory of every method, and of an edit's life afterwards.

    python -m experiments.benchmarks.editing                                  the miniature
    python -m experiments.benchmarks.editing 'only="sd*"' weights=random      full size
    python -m experiments.benchmarks.editing 'only="sd*"' weights=random-small  a dry run anywhere

Random weights need no download: architectures are the published ones, and neither time nor memory
depends on the weights' values. Each case is a command of `run.py` without its images; what is
shortened says so in its name. Cases of one model share it, one model is in memory at a time, and a
case that fails leaves its reason in the table.
"""

from __future__ import annotations

import fnmatch
import gc
import itertools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from omegaconf import DictConfig

from cad.edits import ScoredEdit
from cad.errors import UserError
from cad.models.base import PUBLISHED, DiffusionModel, resolve_device
from cad.store import Store
from cad.weight_edit import WeightEdit
from experiments.benchmarks.measuring import timer, write_benchmark
from experiments.run.command_line import exit_status
from experiments.run.configuration import compose, plain, register_resolvers
from experiments.run.experiment import Experiment, prepare
from experiments.run.rendering import DASH, show_table

MB = 1e6  # bytes
MS = 1e3  # milliseconds in a second
STEPS = ("select", "apply and undo", "save", "load")

log = logging.getLogger(__name__)

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/benchmark_editing")
def main(config: DictConfig) -> None:
    name = "editing" if config.weights == PUBLISHED else f"editing_{config.weights}"
    caption = f"Editing with weights={config.weights}; steps of an edit's life in milliseconds"
    path, device = Path(config.output) / name, resolve_device(config.device)
    rows: list[dict[str, Any]] = []
    for row in measure_cases(config, chosen_cases(config)):
        rows.append(row)
        write_benchmark(path, caption, rows, as_table(rows), device)  # at once: nothing is lost
    show_table(as_table(rows), caption)


def chosen_cases(config: DictConfig) -> dict[str, list[str]]:
    """Names and overrides of the cases that match `only`. UserError if none does."""
    cases: dict[str, list[str]] = plain(config.cases)
    chosen = {name: cases[name] for name in cases if fnmatch.fnmatch(name, config.only)}
    if not chosen:
        raise UserError(f"only={config.only} matches none of the cases: {', '.join(cases)}")
    return chosen


def measure_cases(
    config: DictConfig, cases: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """One row per case. A case's model, the first word of its name, is given up after its last."""
    for name, of_model in itertools.groupby(cases, key=lambda case: case.partition(" ")[0]):
        model = prepare(configure(config, name, [])).model.load()
        parameters = sum(weight.numel() for weight in model.denoiser.parameters())
        for case in of_model:
            log.info("%s", case)
            row = {"case": case, "denoiser parameters": parameters}
            row["dtype"] = str(model.dtype).removeprefix("torch.")
            row["settings"] = " ".join(cases[case])
            try:
                yield row | measure_case(prepare(configure(config, name, cases[case])), model)
            except (UserError, torch.OutOfMemoryError) as error:
                log.error("%s: %s", case, error)
                yield row | {"error": str(error).splitlines()[0]}
            free_memory()
        del model
        free_memory()


def configure(config: DictConfig, model: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration that `run.py` would run."""
    fixed = [f"model={model}", f"device={config.device}", f"dtype={config.dtype}", "logger=none"]
    if config.weights != PUBLISHED:
        fixed.append(f"model.weights={config.weights}")
    small = config.small if config.weights == "random-small" else []
    return compose([*fixed, *small, *overrides, *config.overrides])


def measure_case(experiment: Experiment, model: DiffusionModel) -> dict[str, Any]:
    """Cost of the experiment's edit, with its concepts' references, and the steps of its life."""
    method = experiment.method
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(method, ScoredEdit):
            method.store = Store(scratch)  # scores of earlier runs would cost nothing
        edit = method(model, *experiment.concepts)
        costs = ("seconds", "peak_memory_mb", "memory_kind")
        found = {key: getattr(edit.cost, key) for key in costs} | {"weights": edit.num_weights}
        if isinstance(method, ScoredEdit):
            objective = method.objective(experiment.concepts[0])
            scores = method.scored(model, objective).scores
            found["select"] = median_ms(lambda: method.selection.indices(scores, method.sign))
        path = Path(scratch) / "edit.safetensors"
        found["apply and undo"] = median_ms(lambda: apply_and_undo(edit, model))
        found["save"] = median_ms(lambda: edit.save(path))
        found["load"] = median_ms(lambda: WeightEdit.load(path))
        return found | {"file_mb": path.stat().st_size / MB}


def apply_and_undo(edit: WeightEdit, model: DiffusionModel) -> None:
    with edit.applied(model):
        pass


def median_ms(task: Callable[[], object]) -> float:
    """Milliseconds of a task, the median of as many repetitions as fit into half a second."""
    return MS * timer(task).blocked_autorange(min_run_time=0.5).median


def as_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows in words; a case that failed has its reason in the last column."""
    shown = []
    for row in rows:
        cells = {"case": row["case"], "dtype": row["dtype"], "seconds": DASH}
        if "error" in row:
            shown.append(cells | {"error": row["error"]})
            continue
        cells["seconds"] = f"{row['seconds']:.1f}"
        cells[f"peak memory, MB ({row['memory_kind']})"] = f"{row['peak_memory_mb']:,.0f}"
        cells["weights changed"] = f"{row['weights']:,}"
        cells["file, MB"] = f"{row['file_mb']:.2f}"
        cells |= {f"{step}, ms": f"{row[step]:.1f}" if step in row else DASH for step in STEPS}
        shown.append(cells)
    return pd.DataFrame(shown).fillna("")


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


if __name__ == "__main__":
    sys.exit(exit_status(main))
