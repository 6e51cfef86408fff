"""The notes below a table or figure: its conditions, its signs, and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiments.run.rendering import DASH
from experiments.run.results import read_json
from experiments.tables.cells import NO_EDIT, Cell
from experiments.tables.exhibit import COST, EDIT, METRIC, SEED, ListedRun, Table

COMMIT_DIGITS = 12
MARK = "†"  # the interval leaves the paper's value out


def table_notes(table: Table, cells: Sequence[Cell], runs: Sequence[ListedRun]) -> list[str]:
    """Sentences for a table's caption, each a paragraph."""
    notes = [sentence(note) for note in table.note]
    notes += [_signs(table, cells), *conditions(runs)]
    measured = _measurements(table, cells)
    notes += [f"Measured: {measured}."] if measured else []
    return notes + absences(runs)


def conditions(runs: Sequence[ListedRun]) -> list[str]:
    """The conditions of the finished runs, a sentence for each that differs."""
    commits: dict[str, set[str]] = {}
    for run in runs:
        if run.result is None:
            continue
        metrics = read_json(run.result / "metrics.json")
        environment = read_json(run.result / "environment.json")
        model, sampler = metrics["model"], metrics["sampler"]
        text = (
            f"{model['name']} (revision {model['revision']}): {sampler['steps']} steps, guidance "
            f"{sampler['guidance']:g}, seed {metrics['seed']}, {model['dtype']} on "
            f"{environment['device_name']}"
        )
        commits.setdefault(text, set()).add(_short(environment["commit"]))
    return [f"{text}; commit {', '.join(sorted(found))}." for text, found in commits.items()]


def absences(runs: Sequence[ListedRun]) -> list[str]:
    """Sentences on the runs without a result, and why they have none."""
    missing = [run for run in runs if run.is_missing]
    failed = Counter(run.failed for run in missing if run.failed)
    refused = Counter(run.refused for run in runs if run.refused)
    waiting = len(missing) - failed.total()
    notes = [f"Failed, {_runs(count)}: {reason}" for reason, count in failed.items()]
    notes += [f"Not run yet: {_runs(waiting)} of {len(runs)}"] if waiting else []
    notes += [f"Not run, {_runs(count)}: {reason}" for reason, count in refused.items()]
    return [sentence(note) for note in notes]


def origins(runs: Sequence[ListedRun]) -> list[str]:
    """When, on what and from which commit the finished runs were made."""
    found = [read_json(run.result / "environment.json") for run in runs if run.result is not None]
    return sorted(
        {f"{e['finished'][:10]} on {e['device_name']}, commit {_short(e['commit'])}" for e in found}
    )


def sentence(text: str) -> str:
    """The text with a full stop."""
    return text if text.endswith(".") else f"{text}."


def _measurements(table: Table, cells: Sequence[Cell]) -> str:
    """The number of images behind each metric's cells, and what measured it."""
    parts = []
    for name, shown in table.metrics.items():
        values = [cell.value for cell in cells if cell.place[METRIC] == name and cell.value]
        if not values:
            continue
        if shown.of == COST:
            units = ", ".join(sorted({value.unit for value in values}))
            parts.append(f"{shown.heading}: of one edit each, in {units}")
            continue
        counts = sorted({value.n for value in values})
        spread = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
        versions = ", ".join(sorted({value.version for value in values}))
        parts.append(f"{shown.heading}: n = {spread} by {versions}")
    return "; ".join(parts)


def _signs(table: Table, cells: Sequence[Cell]) -> str:
    """The meaning of those signs that the table has."""
    signs = []
    if any(cell.deviation is not None for cell in cells):
        seeds = ", ".join(table.axes[SEED])
        signs.append(f"means ± standard deviations over seeds {seeds}")
    if any(cell.has_interval for cell in cells):
        signs.append("in brackets the 95 % interval")
    if any(cell.paper is not None for cell in cells):
        models = " and ".join(table.paper_models)
        other = "" if any(cell.comparable for cell in cells) else ", another model"
        signs.append(f"in parentheses the paper's value, of {models}{other}")
    if any(cell.excludes_paper for cell in cells):
        signs.append(f"{MARK}: the interval excludes the paper's value")
    if any(cell.best for cell in cells):
        edits = {*table.axes.get(EDIT, ())} - {NO_EDIT}
        others = "every other edit" if len(edits) != 1 else "without the edit"
        signs.append(f"bold: significantly better than {others} (p < 0.05)")
    if any(cell.value is None for cell in cells):
        signs.append(f"{DASH}: not run")
    return sentence("; ".join(signs)[:1].upper() + "; ".join(signs)[1:])


def _runs(count: int) -> str:
    return f"{count} run{'s' if count > 1 else ''}"


def _short(commit: str) -> str:
    digits, dash, rest = commit.partition("-")
    return f"{digits[:COMMIT_DIGITS]}{dash}{rest}"
