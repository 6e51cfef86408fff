"""A result's table, from the files of its folder alone: console, markdown, tracker, data frame.

Cells are formatted here and nowhere else, so all of them show the same digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from cad.models.base import RANDOM
from experiments.run.configuration import CONF
from experiments.run.groups import MEAN
from experiments.run.results import read_json

DASH = "–"  # nothing was measured
NAMES = {str(key): str(name) for key, name in OmegaConf.load(CONF / "names.yaml").items()}
OURS = "CAD-"  # how the names of the paper's own methods begin


def display(name: str) -> str:
    """ "CAD-Erase" of erase, "French horn" of french_horn."""
    return NAMES.get(name) or (name[:1].upper() + name[1:]).replace("_", " ")


def display_words(text: str) -> str:
    """A name as `display` spells it; of another text the words with an underscore alone.

    FACE_MALE, a label of NudeNet's, stays as it is.
    """
    return NAMES.get(text) or re.sub(r"\b[a-z]+_\w+", lambda word: display(word[0]), text)


def result_table(metrics: dict[str, Any], cost: dict[str, Any]) -> pd.DataFrame:
    """Rows of a run's table, cells as text: quantity, before, after, change."""
    shown = [row for row in metrics["metrics"] if row["scope"] != "group"]
    measured = dict.fromkeys((row["name"], row["scope"]) for row in shown)
    rows = [_metric_row(metrics, name, scope) for name, scope in measured]
    rows += _broken_rows(metrics)
    rows += _cost_rows(metrics, cost)
    rows += _effect_rows(metrics["effect"] or {})
    return pd.DataFrame(rows, columns=["", "before", "after", "change"])


def to_markdown(frame: pd.DataFrame) -> str:
    """`frame` as a markdown table, its cells untouched."""
    return str(frame.to_markdown(index=False, disable_numparse=True)) + "\n"


def show_result(folder: Path, *, reused: bool) -> None:
    """Print a finished run: table, picture and folder."""
    metrics, cost = read_json(folder / "metrics.json"), read_json(folder / "cost.json")
    console = Console(highlight=False)
    if reused:
        console.print("\nThis experiment was finished before; nothing was computed.")
    show_table(result_table(metrics, cost), title(metrics), console)
    pictures = {"before / after": folder / "before_after.png", "attacks": folder / "attack.png"}
    paths = {label: path for label, path in pictures.items() if path.exists()}
    for label, path in (paths | {"result folder": folder}).items():
        console.print(f"{label}: {path}", soft_wrap=True, markup=False)


def show_table(frame: pd.DataFrame, caption: str, console: Console | None = None) -> None:
    """Print a table of ready cells under its caption."""
    table = Table(title=caption, title_justify="left", title_style="bold")
    for number, column in enumerate(frame.columns):
        table.add_column(str(column), justify="left" if number == 0 else "right")
    for cells in frame.itertuples(index=False):
        table.add_row(*[str(cell) for cell in cells])
    (console or Console(highlight=False)).print(table)


def title(metrics: dict[str, Any]) -> str:
    """The run in a line: "CAD-Erase parachute, mini, ratio 0.01 per row of ff"."""
    edit, model = metrics["edit"], metrics["model"]["name"]
    concepts = display_words(join_concepts(metrics))
    if metrics["model"]["revision"] in RANDOM:
        model = f"{model} (RANDOM WEIGHTS: costs, not effects)"
    if edit["name"] == "none":
        return f"{concepts} by {model}, unedited"
    how = "" if edit["ratio"] is None else f", ratio {edit['ratio']:g} per {edit['per']}"
    where = f" of {edit['component']}" if how else ""
    by = "" if edit["unit"] in (None, "weight") else f", by {edit['unit']}"
    return f"{display(edit['name'])} {concepts}, {model}{how}{where}{by}"


def join_concepts(metrics: dict[str, Any]) -> str:
    """The edited concepts in words: "church", "church and parachute"."""
    *rest, last = metrics["concepts"]
    return f"{', '.join(rest)} and {last}" if rest else str(last)


def run_settings(metrics: dict[str, Any]) -> dict[str, Any]:
    """The settings that runs of a sweep differ in, from a result's metrics.json."""
    edit = metrics["edit"]
    return {
        "model": metrics["model"]["name"],
        "concept": join_concepts(metrics),
        "edit": edit["name"],
        "component": edit["component"],
        "ratio": edit["ratio"],
        "per": edit["per"],
        "unit": edit["unit"],
        "seed": metrics["seed"],
    }


def tidy(result: Path) -> pd.DataFrame:
    """The target's and the others' metrics of a result, one row each, with their settings."""
    metrics = read_json(result / "metrics.json")
    rows = [
        run_settings(metrics)
        | {"metric": row["name"], "scope": row["scope"], "state": row["state"]}
        | {key: row[key] for key in ("value", "low", "high", "n", "unit", "version")}
        | {"result": result.name}
        for row in metrics["metrics"]
        if row["scope"] != "group"
    ]
    return pd.DataFrame(rows)


def compare_runs(results: Sequence[dict[str, Any]]) -> tuple[pd.DataFrame, str]:
    """One row per run, from their metrics.json: what they differ in, then metrics by scope.

    Also what they have in common, in words: "mini, edit erase, seed 0". Cells are text.
    """
    settings = pd.DataFrame([run_settings(each) for each in results]).astype(object)
    settings = settings.fillna(DASH).astype(str).map(display_words)
    varying = [key for key in settings if settings[key].nunique() > 1]
    common = settings.drop(columns=varying).iloc[0]
    words = [f"{key} {value}" for key, value in common.items() if value != DASH]
    scored = pd.DataFrame([changes(each) for each in results]).fillna(DASH)
    return pd.concat([settings[varying], scored], axis="columns"), ", ".join(words)


def find_metric(
    metrics: dict[str, Any], name: str, scope: str, state: str, group: str | None = None
) -> dict[str, Any] | None:
    """The aggregate of a metric over a scope ("target", "others", "general"; "group"), or None."""
    for row in metrics["metrics"]:
        found_group = group is None or row["group"] == group
        if found_group and (row["name"], row["scope"], row["state"]) == (name, scope, state):
            found: dict[str, Any] = row
            return found
    return None


def format_interval(row: dict[str, Any] | None) -> str:
    """Value and 95 % interval in the metric's unit, "95.0 [76.4, 99.1]", or a dash.

    Of several seeds "95.0 ± 2.1", with the standard deviation.
    """
    if row is None:
        return DASH
    if "deviation" in row:
        return f"{row['value']:.{row['decimals']}f} ± {row['deviation']:.{row['decimals']}f}"
    value, low, high = (f"{row[key]:.{row['decimals']}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def changes(metrics: dict[str, Any]) -> dict[str, str]:
    """ "95.0 → 5.0 [0.9, 23.6]", before and after with its interval, by metric and scope."""
    found = {}
    for name, scope in dict.fromkeys((r["name"], r["scope"]) for r in metrics["metrics"]):
        if scope == "group":
            continue
        before = find_metric(metrics, name, scope, "before")
        after = find_metric(metrics, name, scope, "after")
        words = f"{before['value']:.{before['decimals']}f} → " if before and after else ""
        found[f"{display_words(name)}, {scope}"] = words + format_interval(after or before)
    return found


def _metric_row(metrics: dict[str, Any], name: str, scope: str) -> list[str]:
    before = find_metric(metrics, name, scope, "before")
    after = find_metric(metrics, name, scope, "after")
    change = DASH
    if before is not None and after is not None:
        change = f"{after['value'] - before['value']:+.{after['decimals']}f}"
    row = before or after or {}
    who = {
        "general": "general captions",
        "target": join_concepts(metrics),
        "others": "the other group" if row["groups"] == 1 else f"the {row['groups']} others",
    }[scope]
    arrow = "" if scope == "target" else " ↑" if row["higher_is_better"] else " ↓"
    mean = ", mean of groups" if row["over"] == MEAN else ""
    label = f"{name.replace('_', ' ')} on {who}, {row['unit']}{arrow} (n = {row['n']}{mean})"
    return [label, format_interval(before), format_interval(after), change]


def _broken_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """A row if any image had values that were not finite: such images are black in the set."""
    sets = list(metrics["images"].values())
    if not any(made["broken"] for states in sets for made in states.values()):
        return []
    cells = []
    for state in ("before", "after"):
        made = [states[state] for states in sets if state in states]
        broken, count = (sum(images[key] for images in made) for key in ("broken", "count"))
        cells.append(f"{broken} of {count}" if made else DASH)
    return [["broken images (not finite, saved as black) ↓", *cells, DASH]]


def _effect_rows(effect: dict[str, Any]) -> list[list[str]]:
    rows = []
    if "count" in effect:
        label = f"predicted against measured effect, Pearson r (n = {effect['count']})"
        rows.append([label, DASH, f"{effect['pearson_r']:.3f}", DASH])
    if "seeds" in effect:
        before, predicted, measured = (effect[key] for key in ("unedited", "predicted", "measured"))
        label = f"J on fresh noise (predicted change {predicted:+.4g})"
        rows.append([label, f"{before:.4g}", f"{before + measured:.4g}", f"{measured:+.4g}"])
        label = f"weights in common with other seeds' choice, % (n = {effect['seeds']})"
        rows.append([label, DASH, f"{100 * effect['overlap']:.1f}", DASH])
    return rows


def _cost_rows(metrics: dict[str, Any], cost: dict[str, Any]) -> list[list[str]]:
    if metrics["edit"]["name"] == "none":
        return []
    kind = f" ({cost['memory_kind']})" if cost["memory_kind"] else ""
    cached = " (cached; cost of making it)" if cost["cached"] else ""
    return [
        ["weights changed", DASH, f"{metrics['edit']['num_weights']:,}", DASH],
        [f"editing time{cached}", DASH, f"{cost['seconds']:.1f} s", DASH],
        [f"peak memory of editing{kind}", DASH, f"{cost['peak_memory_mb']:,.0f} MB", DASH],
    ]
