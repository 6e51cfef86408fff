"""Tables and finished runs written by hand, for what only reads and lays out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.config import REPOSITORY, register_resolvers
from experiments.items.plan import Run, State
from experiments.results import ResultFolder, write_json, write_records
from experiments.tables.table import Table, read_table

CONF = REPOSITORY / "conf"
NUMBERS = range(1, 15)
COMMIT = "0123456789abcdef"
FINISHED = "2026-01-02T03:04:05+00:00"


@functools.cache
def compose_tables(*overrides: str) -> DictConfig:
    """The configuration of experiments.make."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("make", list(overrides))


def composed_table(number: int, model: str | None = None, *, fast: bool = False) -> Table:
    """A table of conf/table."""
    return read_table(compose_tables(f"table=table{number:02d}").table, model, fast)


def small_table(model: str | None = None, *, fast: bool = False, **changed: Any) -> Table:
    """Two objects by two methods, as Table 1, with `changed` keys."""
    table = {
        "number": 1,
        "title": "accuracy",
        "models": ["sd14"],
        "axes": {"concept": ["church", "tench"], "edit": ["none", "erase"]},
        "rows": ["concept"],
        "columns": ["metric", "edit"],
        "compare": "edit",
        "paper": {"row": "concept", "column": "edit"},
        "metrics": {
            "target": {
                "heading": "accuracy on the class, %",
                "of": "accuracy",
                "better": "low",
                "best": True,
                "paper": {"metric": "accuracy_target"},
            }
        },
    }
    return read_table(OmegaConf.create(table | changed), model, fast)


def finished_run(
    runs: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    edit: str = "erase",
    concept: str = "church",
    records: Sequence[dict[str, Any]] = (),
    cost: Mapping[str, Any] | None = None,
) -> Run:
    """A run whose folder has the given rows of metrics, records and cost."""
    result = ResultFolder(runs, name, "0")
    work = result.open()
    metrics = {
        "model": {"name": "sd14", "revision": "abc", "dtype": "float16"},
        "concepts": [concept],
        "edit": {"name": edit},
        "seed": 0,
        "sampler": {"steps": 50, "guidance": 7.5, "kind": "default", "batch_size": 16},
        "metrics": list(rows),
    }
    write_json(work / "metrics.json", metrics)
    costs = {"seconds": 12.34, "peak_memory_mb": 567.8, "cached": False, "memory_kind": "test"}
    write_json(work / "cost.json", costs | dict(cost or {}))
    write_json(
        work / "environment.json",
        {"commit": COMMIT, "device_name": "a GPU", "finished": FINISHED},
    )
    write_records(work, list(records))
    result.close()
    return Run((f"concept={concept}", f"edit={edit}"), State.DONE, "", None, result)


def row(
    value: float, low: float, high: float, *, scope: str = "target", **changed: Any
) -> dict[str, Any]:
    """A row of metrics.json."""
    plain = {
        "scope": scope,
        "group": None,
        "state": "after",
        "name": "accuracy",
        "n": 500,
        "unit": "%",
        "decimals": 1,
        "higher_is_better": True,
        "version": "test",
    }
    return plain | {"value": value, "low": low, "high": high} | changed
