"""What is said below a table: conditions, number of images, signs, and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.rendering import DASH
from experiments.results import read_json
from experiments.tables.cells import Cell
from experiments.tables.plan import Overrides, Run, State
from experiments.tables.rendering import MARK
from experiments.tables.table import COST, METRIC, Table

COMMIT_DIGITS = 12


def table_notes(
    table: Table, cells: Sequence[Cell], runs: Sequence[Run], failed: Mapping[Overrides, str]
) -> list[str]:
    """Sentences for the caption, each a paragraph."""
    notes = [_end(note) for note in table.notes]
    notes += [_signs(table, cells)]
    notes += conditions(runs)
    measured = measurements(table, cells)
    notes += [f"Measured: {measured}."] if measured else []
    return notes + absences(runs, failed)


def conditions(runs: Sequence[Run]) -> list[str]:
    """Under what the finished runs were made, a sentence for each that differs."""
    found: dict[str, set[str]] = {}
    for run in runs:
        if run.state != State.DONE:
            continue
        metrics = read_json(run.folder / "metrics.json")
        environment = read_json(run.folder / "environment.json")
        model, sampler = metrics["model"], metrics["sampler"]
        text = (
            f"{model['name']} (revision {model['revision']}): {sampler['steps']} steps, guidance "
            f"{sampler['guidance']:g}, seed {metrics['seed']}, {model['dtype']} on "
            f"{environment['device_name']}"
        )
        found.setdefault(text, set()).add(_short(environment["commit"]))
    return [f"{text}; commit {', '.join(sorted(commits))}." for text, commits in found.items()]


def measurements(table: Table, cells: Sequence[Cell]) -> str:
    """Of each metric: the number of images behind a cell, and what measured it."""
    parts = []
    for name, spec in table.metrics.items():
        values = [cell.value for cell in cells if cell.place[METRIC] == name and cell.value]
        if not values:
            continue
        counts = {value.n for value in values}
        spread = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{min(counts)}"
        units = sorted({value.unit for value in values})
        versions = sorted({value.version for value in values})
        if spec.of == COST:
            parts.append(f"{spec.heading}: of one edit each, in {', '.join(units)}")
        else:
            parts.append(f"{spec.heading}: n = {spread} by {', '.join(versions)}")
    return "; ".join(parts)


def absences(runs: Sequence[Run], failed: Mapping[Overrides, str]) -> list[str]:
    """What was not run, and why."""
    notes = []
    missing = [run for run in runs if run.state == State.MISSING]
    reasons = Counter(failed[run.overrides] for run in missing if run.overrides in failed)
    for reason, count in reasons.items():
        notes.append(_end(f"Failed, {_runs(count)}: {reason}"))
    waiting = len(missing) - sum(reasons.values())
    notes += [f"Not run yet: {_runs(waiting)} of {len(runs)}."] if waiting else []
    refused = Counter(run.reason for run in runs if run.state == State.REFUSED)
    for reason, count in refused.items():
        notes.append(_end(f"Not run, {_runs(count)}: {reason}"))
    return notes


def _signs(table: Table, cells: Sequence[Cell]) -> str:
    """What the signs mean, of those that the table has."""
    signs = []
    if any(cell.has_interval for cell in cells):
        signs.append("in brackets the 95 % interval")
    if any(cell.paper is not None for cell in cells):
        models = " and ".join(table.paper_models)
        other = "" if any(cell.comparable for cell in cells) else ", another model"
        signs.append(f"in parentheses the paper's value, of {models}{other}")
    if any(cell.excludes_paper for cell in cells):
        signs.append(f"{MARK}: the interval excludes the paper's value")
    if any(cell.best for cell in cells):
        signs.append("bold: the best")
    if any(cell.value is None for cell in cells):
        signs.append(f"{DASH}: not run")
    return _end("; ".join(signs)[:1].upper() + "; ".join(signs)[1:])


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"


def _short(commit: str) -> str:
    digits, dash, rest = commit.partition("-")
    return f"{digits[:COMMIT_DIGITS]}{dash}{rest}"


def _end(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
