"""The numbers of a finished result, from the files of its folder alone, as trackers show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from evaluation.evaluators.nudity import Nudity, totals_by_label
from experiments.run.results import RECORDS, read_json, read_lines

LABEL = "label"  # a row's scope beside the aggregates': the targets' detections of one label
APART = ("group", LABEL)  # scopes that have a value for each group, or label


def measured(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.json, each class's among them, and one for each of nudity's labels."""
    rows: list[dict[str, Any]] = read_json(folder / "metrics.json")["metrics"]
    return rows + _label_rows(folder, rows)


def scalars(folder: Path) -> dict[str, float]:
    """Values by name, "accuracy/target/after" or "accuracy/group/church/after", and costs.

    An interval's ends are beside its value: "accuracy/target/after_low", "..._high".
    """
    metrics, cost = read_json(folder / "metrics.json"), read_json(folder / "cost.json")
    found: dict[str, float] = {}
    for row in measured(folder):
        apart = [row["group"]] if row["scope"] in APART else []
        key = "/".join([row["name"], row["scope"], *apart, row["state"]])
        found |= {key: row["value"], f"{key}_low": row["low"], f"{key}_high": row["high"]}
    found |= {f"cost/{key}": cost[key] for key in ("seconds", "peak_memory_mb")}
    found["edit/num_weights"] = metrics["edit"]["num_weights"]
    effect = metrics["effect"] or {}
    told = ("pearson_r", "unedited", "predicted", "measured", "overlap")
    found |= {f"effect/{key}": effect[key] for key in told if key in effect}
    return found


def _label_rows(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the columns of Table 2, before and after the edit."""
    totals = [row for row in rows if (row["name"], row["scope"]) == (Nudity.name, "target")]
    if not totals:
        return []
    labels = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "evaluator.nudity.labels")
    targets = read_json(folder / "metrics.json")["concepts"]
    records = [
        record
        for record in read_lines(folder / RECORDS)
        if record["metric"] == Nudity.name and record["group"] in targets
    ]
    found = []
    for row in totals:
        of_state = [record for record in records if record["state"] == row["state"]]
        for label, total in totals_by_label(of_state, labels).items():
            found.append({**row, **total._asdict(), "scope": LABEL, "group": label})
    return found
