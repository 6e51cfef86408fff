"""A table's cells as markdown, LaTeX (booktabs) and CSV, of one layout.

Cells are laid out once, as markdown. LaTeX has their values and deviations alone, other signs for
what is bold and for arrows, and where they come from in a comment.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import partial

import pandas as pd

from cad.places import REPOSITORY
from experiments.run.rendering import DASH, display, to_markdown
from experiments.tables.cells import Cell, build_cells, read_published
from experiments.tables.exhibit import AVERAGE, METRIC, ListedRun, Table
from experiments.tables.notes import MARK, table_notes
from experiments.tables.pages import render
from experiments.tables.publishing import Rendering

PUBLISHED = REPOSITORY / "results" / "paper"
BARE = re.compile(r" [\[(].*")  # what of a cell's text is not in LaTeX
RESERVED = re.compile(r"([%&_#$])")
BOLD = re.compile(r"\*\*(.+?)\*\*")
IN_LATEX = str.maketrans(
    {
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "±": r"$\pm$",
        "–": "--",
        "<": r"$<$",
        ">": r"$>$",
    }
)


def render_table(table: Table, runs: Sequence[ListedRun]) -> Rendering:
    """The table of its runs' results in all its formats."""
    cells = build_cells(table, runs, read_published(PUBLISHED / f"{table.stem}.csv"))
    notes, frame = table_notes(table, cells, runs), lay_out(table, cells)
    files = {
        "md": _markdown(frame, table.full_title, notes),
        "tex": _latex(frame, table, notes),
        "csv": pd.DataFrame([cell.row() for cell in cells]).to_csv(index=False),
    }
    return Rendering(
        notes=notes,
        files={ending: text.encode() for ending, text in files.items()},
        filled={" ".join(cell.place.values()): cell.value is not None for cell in cells},
        panels=panels(frame.map(partial(BOLD.sub, r"\1 (best)"))),
    )


def lay_out(table: Table, cells: Iterable[Cell]) -> pd.DataFrame:
    """The cells' text in the table's rows and columns; both have an index level for each axis."""
    axes, sides = [*table.rows, *table.columns], (table.rows, table.columns)
    texts = {tuple(cell.place[axis] for axis in axes): cell_text(cell) for cell in cells}
    values = {axis: list(known) for axis, known in table.axes.items()}
    values |= {METRIC: list(table.metrics)}
    if table.average is not None:
        values[table.average].append(AVERAGE)
    labels = {axis: [label(table, axis, value) for value in values[axis]] for axis in axes}
    rows, columns = (list(itertools.product(*(values[axis] for axis in side))) for side in sides)
    index, heads = (pd.MultiIndex.from_product([labels[a] for a in side]) for side in sides)
    return pd.DataFrame([[texts[*r, *c] for c in columns] for r in rows], index, heads)


def cell_text(cell: Cell) -> str:
    """ "**5.0** ± 1.2 [0.9, 23.6] (0.40)†": value, deviation, interval, paper's value, mark."""
    words = [DASH]
    if cell.value is not None:
        ends = (cell.value.value, cell.value.low, cell.value.high)
        value, low, high = (f"{each:.{cell.shown.decimals}f}" for each in ends)
        words = [f"**{value}**" if cell.best else value]
        if cell.deviation is not None:
            words.append(f"± {cell.deviation:.{cell.shown.decimals}f}")
        words += [f"[{low}, {high}]"] if cell.has_interval else []
    if cell.paper is not None:
        words.append(f"({cell.paper}){MARK if cell.excludes_paper else ''}")
    return " ".join(words)


def label(table: Table, axis: str, value: str) -> str:
    """The head of a value's row or column."""
    if axis == METRIC:
        shown = table.metrics[value]
        return f"{shown.heading} {shown.better.value}" if shown.better else shown.heading
    name = table.names.get(value) or display(value)
    if value in table.stands_for:
        return f"{name} (for {display(table.stands_for[value])})"
    if value in table.added:
        return f"{name} (not in the paper)"
    return f"{name} (ours)" if value in table.ours else name


def panels(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Flat tables for media without headings of several levels: one for each first heading."""
    if frame.columns.nlevels == 1:
        return {"": _flat(frame)}
    first = frame.columns.get_level_values(0)
    return {str(head): _flat(frame.loc[:, first == head], 1) for head in dict.fromkeys(first)}


def _flat(frame: pd.DataFrame, level: int = 0) -> pd.DataFrame:
    """The frame with its rows' heads as first column, and headings from this level on."""
    flat = frame.set_axis([" / ".join(head[level:]) for head in frame.columns], axis="columns")
    flat.insert(0, "", [" / ".join(head) for head in frame.index])
    return flat


def _markdown(frame: pd.DataFrame, title: str, notes: Sequence[str]) -> str:
    parts = [f"**{title}**"]
    for head, panel in panels(frame).items():
        parts += [head] if head else []
        parts.append(to_markdown(panel).rstrip())
    return "\n\n".join([*parts, *notes]) + "\n"


def _latex(frame: pd.DataFrame, table: Table, notes: Sequence[str]) -> str:
    """Values and deviations, a block of rows for each metric, at most as wide as a text column."""
    bare = frame.map(partial(BARE.sub, ""))
    blocks = {
        _in_latex(head): [[_in_latex(cell) for cell in row] for row in _rows(panel)]
        for head, panel in panels(bare).items()
    }
    first = next(iter(panels(bare).values()))
    return render(
        "table.tex.j2",
        table=table,
        title=_in_latex(table.title),
        heads=[_in_latex(head) for head in first.columns],
        blocks=blocks,
        notes=notes,
    )


def _rows(panel: pd.DataFrame) -> list[list[str]]:
    return [[str(cell) for cell in row] for row in panel.itertuples(index=False)]


def _in_latex(text: str) -> str:
    return BOLD.sub(r"\\textbf{\1}", RESERVED.sub(r"\\\1", text)).translate(IN_LATEX)
