"""A table's cells as markdown, LaTeX (booktabs), HTML and CSV: one layout, pandas writes them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.items.item import Place
from experiments.items.publishing import Rendered
from experiments.rendering import DASH, to_markdown
from experiments.tables.cells import Cell, plain_row
from experiments.tables.table import METRIC, Table

ARROWS = {None: "", "low": " ↓", "high": " ↑"}
MARK = "†"  # the interval leaves the paper's value out
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "%": r"\%",
        "_": r"\_",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "†": r"$^\dagger$",
        "–": "--",
    }
)


@dataclass(frozen=True)
class Markup:
    """How a format writes text and bold text."""

    text: Callable[[str], str]
    bold: str  # with {} for what is bold


MARKDOWN = Markup(str, "**{}**")
CONSOLE = Markup(str, "{} (best)")
TEX = Markup(lambda text: text.translate(LATEX), r"\textbf{{{}}}")
HTML = Markup(html.escape, "<b>{}</b>")


def cell_text(cell: Cell, markup: Markup) -> str:
    """ "**5.0** [0.9, 23.6] (0.40)†": the value, its interval, the paper's value, the mark."""
    words = [markup.text(DASH)]
    if cell.value is not None:
        decimals = cell.spec.decimals
        value, low, high = (
            f"{each:.{decimals}f}" for each in (cell.value.value, cell.value.low, cell.value.high)
        )
        words = [markup.bold.format(value) if cell.best else value]
        words += [f"[{low}, {high}]"] if cell.has_interval else []
    if cell.paper is not None:
        words.append(f"({cell.paper}){markup.text(MARK) if cell.excludes_paper else ''}")
    return " ".join(words)


def layout(table: Table, cells: Iterable[Cell], markup: Markup) -> pd.DataFrame:
    """The cells' text in the table's rows and columns; both have an index level for each axis."""
    rows, columns = table.config.rows, table.config.columns
    texts: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for cell in sorted(cells, key=lambda cell: _order(table, cell.place)):
        row = tuple(markup.text(label(table, axis, cell.place[axis])) for axis in rows)
        column = tuple(markup.text(label(table, axis, cell.place[axis])) for axis in columns)
        texts.setdefault(row, {})[column] = cell_text(cell, markup)
    heads = list(dict.fromkeys(column for row in texts.values() for column in row))
    values = [[row[head] for head in heads] for row in texts.values()]
    return pd.DataFrame(values, _index(list(texts)), _index(heads))


def label(table: Table, axis: str, value: str) -> str:
    """What stands at the head of a value's row or column."""
    if axis == METRIC:
        spec = table.metrics[value]
        return spec.heading + ARROWS[spec.better]
    if value in table.sweep.stands_for:
        return f"{value} (for {table.sweep.stands_for[value]})"
    return value


def panels(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Flat tables for media without headings of several levels: one for each first heading."""
    if frame.columns.nlevels == 1:
        return {"": _flat(frame)}
    first = frame.columns.get_level_values(0)
    return {
        str(head): _flat(frame.loc[:, first == head].droplevel(0, axis="columns"))
        for head in dict.fromkeys(first)
    }


def render_table(table: Table, cells: Sequence[Cell], notes: Sequence[str]) -> Rendered:
    """The table in all its formats."""
    texts = {
        "md": _markdown(layout(table, cells, MARKDOWN), table.title, notes),
        "tex": _latex(table, layout(table, cells, TEX), [f"{table.title}.", *notes]),
        "csv": pd.DataFrame([plain_row(cell) for cell in cells]).to_csv(index=False),
    }
    return Rendered(
        notes=notes,
        body=_html(table, layout(table, cells, HTML)),
        files={ending: text.encode() for ending, text in texts.items()},
        panels=panels(layout(table, cells, CONSOLE)),
    )


def _index(labels: Sequence[tuple[str, ...]]) -> pd.Index:
    """The labels, of several levels where they have several parts."""
    if len(labels[0]) == 1:
        return pd.Index([label for (label,) in labels])
    return pd.MultiIndex.from_tuples(labels)


def _order(table: Table, place: Place) -> tuple[int, ...]:
    axes = (*table.config.rows, *table.config.columns)
    return tuple(table.values(axis).index(place[axis]) for axis in axes)


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    rows, heads = ([_joined(each) for each in axis] for axis in (frame.index, frame.columns))
    flat = frame.set_axis(heads, axis="columns")
    flat.insert(0, "", rows)
    return flat


def _joined(label: str | tuple[str, ...]) -> str:
    return label if isinstance(label, str) else " / ".join(label)


def _markdown(frame: pd.DataFrame, title: str, notes: Sequence[str]) -> str:
    parts = [f"**{title}**"]
    for head, panel in panels(frame).items():
        parts += [head] if head else []
        parts.append(to_markdown(panel).rstrip())
    return "\n\n".join([*parts, *notes]) + "\n"


def _latex(table: Table, frame: pd.DataFrame, caption: Sequence[str]) -> str:
    written = frame.style.to_latex(
        hrules=True,
        sparse_index=False,
        multicol_align="c",
        position="t",
        position_float="centering",
        caption=TEX.text(" ".join(caption)),
        label=f"tab:{table.name}",
        column_format="l" * frame.index.nlevels + "r" * frame.shape[1],
    )
    return str(written)


def _html(table: Table, frame: pd.DataFrame) -> str:
    return str(frame.style.set_uuid(table.name).to_html(sparse_index=False))
