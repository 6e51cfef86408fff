"""Tables and finished runs written by hand, for what only reads and lays out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from experiments.run.configuration import compose
from experiments.run.results import ResultFolder, write_json, write_records
from experiments.tables.exhibit import Exhibit, ListedRun, Place, Table, read_exhibit

NUMBERS = range(1, 15)
COMMIT = "0123456789abcdef"
FINISHED = "2026-01-02T03:04:05+00:00"
FIGURES = ["components", "stages", "faithfulness", "robustness"]
FIGURES += [f"figure{number}" for number in range(2, 13)]
VERSIONS = [(None, False), ("mini", False), ("mini", True)]


@functools.cache
def exhibit_nodes() -> DictConfig:
    """Every file of conf/table and conf/figure, composed at once."""
    stems = {"table": [f"table{number:02d}" for number in NUMBERS], "figure": FIGURES}
    chosen = [f"+{group}@all.{group}.{stem}={stem}" for group in stems for stem in stems[group]]
    return cast(DictConfig, compose(chosen).all)


def composed_table(number: int, model: str | None = None, *, fast: bool = False) -> Table:
    """A table of conf/table."""
    stem = f"table{number:02d}"
    node = exhibit_nodes().table[stem]
    return cast(Table, read_exhibit("table", stem, node, model, fast))


def composed_figure(stem: str, model: str | None = None, *, fast: bool = False) -> Exhibit:
    """A figure of conf/figure."""
    return read_exhibit("figure", stem, exhibit_nodes().figure[stem], model, fast)


def small_table(model: str | None = None, *, fast: bool = False, **changed: Any) -> Table:
    """Two objects by two methods, as Table 1, with `changed` keys."""
    table = {
        "called": "Table 1",
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
    node = OmegaConf.create(table | changed)
    return cast(Table, read_exhibit("table", "table01", node, model, fast))


def finished_run(
    runs: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    place: Place | None = None,
    edit: str = "erase",
    ratio: float = 0.01,
    concept: str = "church",
    records: Sequence[dict[str, Any]] = (),
    **changed: Any,
) -> ListedRun:
    """A run whose folder has these rows of metrics and these records; `changed` keys of metrics."""
    folder = ResultFolder(runs, name, "0")
    work = folder.open()
    metrics = {
        "model": {"name": "sd14", "revision": "abc", "dtype": "float16"},
        "concepts": [concept],
        "edit": {"name": edit, "ratio": ratio, "per": "row", "unit": "weight", "component": "ff"}
        | {"num_weights": 9},
        "seed": 0,
        "sampler": {"steps": 50, "guidance": 7.5, "kind": "default", "batch_size": 16},
        "effect": None,
        "metrics": list(rows),
    }
    write_json(work / "metrics.json", metrics | changed)
    costs = {"seconds": 12.34, "peak_memory_mb": 567.8, "cached": False, "memory_kind": "test"}
    write_json(work / "cost.json", costs)
    environment = {"commit": COMMIT, "device_name": "a GPU", "finished": FINISHED}
    write_json(work / "environment.json", environment)
    write_records(work, list(records))
    place = place or {"model": "sd14", "concept": concept, "edit": edit}
    overrides = tuple(f"{axis}={value}" for axis, value in place.items())
    return ListedRun(0, place, overrides, result=folder.close())


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
