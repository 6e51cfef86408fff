"""A result folder written by hand, for what only reads results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.run.groups import POOLED
from experiments.run.results import ResultFolder, write_json

BEFORE = {"target": (95.0, 76.4, 99.1, 20), "others": (80.0, 73.9, 85.0, 200)}
AFTER = {"target": (5.0, 0.9, 23.6, 20), "others": (76.5, 70.2, 81.8, 200)}


def write_result(
    runs: Path,
    *,
    concept: str = "parachute",
    ratio: float | None = 0.01,
    effect: bool = False,
    broken: int = 0,
    seed: int = 0,
) -> Path:
    """A finished run of `concept` at `ratio`; `ratio=None` is edit=none. Values rise by `seed`."""
    folder = ResultFolder(runs, f"mini-{concept}-erase", f"{ratio}-{seed}")
    work = folder.open()
    states = {"before": BEFORE} if ratio is None else {"before": BEFORE, "after": AFTER}
    rows = [
        _row(scope, state, numbers[0] + seed, *numbers[1:])
        for state, scopes in states.items()
        for scope, numbers in scopes.items()
    ]
    edit: dict[str, Any] = {"name": "none", "num_weights": 0, "fingerprint": "none"}
    edit |= {"ratio": None, "per": None, "unit": None, "component": None}
    if ratio is not None:
        edit |= {"name": "erase", "num_weights": 12345, "fingerprint": "abc"}
        edit |= {"ratio": ratio, "per": "row", "unit": "weight", "component": "ff"}
    metrics = {
        "model": {"name": "mini", "revision": "local"},
        "concepts": [concept],
        "edit": edit,
        "seed": seed,
        "images": {
            "concept": {
                state: {"folder": state, "count": 220, "broken": broken if state == "after" else 0}
                for state in states
            }
        },
        "effect": {"count": 50, "share": 0.001, "pearson_r": 0.93} if effect else None,
        "metrics": rows,
    }
    write_json(work / "metrics.json", metrics)
    write_json(
        work / "cost.json",
        {
            "seconds": 18.24,
            "peak_memory_mb": 512.3,
            "cached": False,
            "memory_kind": "resident growth",
        },
    )
    (work / "config.yaml").write_text("seed: 0\n")
    return folder.close()


def _row(scope: str, state: str, value: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {
        "scope": scope,
        "group": None,
        "groups": 1 if scope == "target" else 10,
        "over": POOLED,
        "state": state,
        "name": "accuracy",
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "unit": "%",
        "decimals": 1,
        "higher_is_better": True,
        "version": "test",
    }
