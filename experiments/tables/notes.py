"""What is said below a table: signs, number of images, and what every item says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.items.notes import absences, conditions, end
from experiments.items.plan import Overrides, Run
from experiments.rendering import DASH
from experiments.tables.cells import Cell
from experiments.tables.rendering import MARK
from experiments.tables.table import COST, METRIC, Table


def table_notes(
    table: Table, cells: Sequence[Cell], runs: Sequence[Run], failed: Mapping[Overrides, str]
) -> list[str]:
    """Sentences for the caption, each a paragraph."""
    notes = [end(note) for note in table.sweep.notes]
    notes += [_signs(table, cells)]
    notes += conditions(runs)
    measured = measurements(table, cells)
    notes += [f"Measured: {measured}."] if measured else []
    return notes + absences(runs, failed)


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


def _signs(table: Table, cells: Sequence[Cell]) -> str:
    """What the signs mean, of those that the table has."""
    signs = []
    if any(cell.has_interval for cell in cells):
        signs.append("in brackets the 95 % interval")
    if any(cell.paper is not None for cell in cells):
        models = " and ".join(table.sweep.paper_models)
        other = "" if any(cell.comparable for cell in cells) else ", another model"
        signs.append(f"in parentheses the paper's value, of {models}{other}")
    if any(cell.excludes_paper for cell in cells):
        signs.append(f"{MARK}: the interval excludes the paper's value")
    if any(cell.best for cell in cells):
        signs.append("bold: the best")
    if any(cell.value is None for cell in cells):
        signs.append(f"{DASH}: not run")
    return end("; ".join(signs)[:1].upper() + "; ".join(signs)[1:])
