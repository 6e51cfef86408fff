"""What edits cost at full size: seconds and peak memory, without any weights to download.

    python -m experiments.benchmarks.editing                 every case, random weights, full size
    python -m experiments.benchmarks.editing 'only="sdxl*"'          some of them
    python -m experiments.benchmarks.editing weights=random-small   a dry run on any machine

The architectures are the published ones; time and memory do not depend on the weights' values. Each
case is a command of `run.py` without its images, made by the same code and measured by the same
instrument. What is shortened says so in its name, and `times` what the whole would take more. Cases
of one model share it, one model is in memory at a time; a case that fails leaves its reason.
"""

from __future__ import annotations

import fnmatch
import gc
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from cad.errors import UserError
from cad.models.base import DiffusionModel, resolve_device
from experiments.benchmarks.measuring import write_benchmark
from experiments.command_line import exit_status
from experiments.composing import composer
from experiments.config import check, plain, register_resolvers, settle
from experiments.experiment import build_method, quiet_libraries
from experiments.rendering import DASH, show_table

SMALL = "random-small"

log = logging.getLogger(__name__)

register_resolvers()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="benchmark_editing")
def main(config: DictConfig) -> None:
    quiet_libraries()
    cases = chosen_cases(config)
    rows: list[dict[str, Any]] = []
    for model_name in dict.fromkeys(str(case["model"]) for case in cases):
        of_model = [case for case in cases if case["model"] == model_name]
        for row in run_cases(config, model_name, of_model):
            rows.append(row)
            write(config, rows)  # at once: what was measured is not lost
    show_table(as_table(rows), caption(config))
    log.info("written to %s", config.output)


def chosen_cases(config: DictConfig) -> list[dict[str, Any]]:
    """The cases whose name matches `only`. UserError if none does."""
    cases = [{"name": str(name), **plain(case)} for name, case in config.cases.items()]
    chosen = [case for case in cases if fnmatch.fnmatch(case["name"], config.only)]
    if not chosen:
        names = ", ".join(case["name"] for case in cases)
        raise UserError(f"only={config.only} matches none of the cases: {names}")
    return chosen


def run_cases(
    config: DictConfig, model_name: str, cases: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Rows of the cases of one model, which is built once and given up in the end."""
    start = time.perf_counter()
    cfg = compose(config, model_name, [])
    model: DiffusionModel = instantiate(cfg.model.adapter, _convert_="all")
    log.info("%s built in %.0f s", model_name, time.perf_counter() - start)
    parameters = sum(weight.numel() for weight in model.denoiser.parameters())
    for case in cases:
        row = {"case": case["name"], "model": model_name, "denoiser parameters": parameters}
        row |= {"dtype": cfg.dtype, "settings": " ".join(case["overrides"])}
        log.info("%s", case["name"])
        try:
            yield row | measure_case(
                compose(config, model_name, case["overrides"]), model, float(case["times"])
            )
        except (UserError, torch.OutOfMemoryError) as error:
            log.error("%s: %s", case["name"], error)
            yield row | {"error": str(error).splitlines()[0]}
        _free()
    del model
    _free()


def compose(config: DictConfig, model_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration that `run.py` would run. UserError as `check`."""
    fixed = [f"model={model_name}", f"model.weights={config.weights}", "logger=none"]
    fixed += [f"device={config.device}", f"dtype={config.dtype}"]
    fixed += config.small if config.weights == SMALL else []
    with composer() as compose_one:
        cfg = compose_one("config", [*fixed, *overrides, *config.overrides])
    check(cfg)
    return settle(cfg)


def measure_case(cfg: DictConfig, model: DiffusionModel, times: float) -> dict[str, Any]:
    """What the edit of `cfg` took, and `times` as long; its concepts' references included."""
    concepts = [instantiate(node) for node in cfg.concepts.values()]
    edit = build_method(cfg)(model, *concepts)
    return {
        "seconds": edit.cost.seconds,
        "times": times,
        "whole": times * edit.cost.seconds,
        "peak_memory_mb": edit.cost.peak_memory_mb,
        "memory_kind": edit.cost.memory_kind,
        "weights": edit.num_weights,
    }


def as_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows in words; a case that failed has its reason in the last column."""
    return pd.DataFrame([_cells(row) for row in rows]).fillna("")


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"case": row["case"], "model": row["model"], "dtype": row["dtype"]}
    if "error" in row:
        return cells | {"seconds": DASH, "error": row["error"]}
    return cells | {
        "seconds": f"{row['seconds']:.1f}",
        "whole, s": f"{row['whole']:.0f}" if row["times"] != 1 else f"{row['whole']:.1f}",
        f"peak memory, MB ({row['memory_kind']})": f"{row['peak_memory_mb']:,.0f}",
        "weights changed": f"{row['weights']:,}",
    }


def caption(config: DictConfig) -> str:
    return f"Editing with weights={config.weights}; random weights: costs, not effects"


def write(config: DictConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    """editing_WEIGHTS.json and .md, as far as they are measured."""
    folder, name = Path(config.output), f"editing_{config.weights}"
    device = resolve_device(config.device)
    write_benchmark(folder, name, caption(config), rows, device, as_table(rows))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(exit_status(main))
