"""A figure out of its runs: conf/figure names the function, `draw(runs, **settings) -> Drawing`.

It is called with the figure's finished runs, at least one, and reads nothing but their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from hydra.utils import instantiate
from matplotlib.figure import Figure as Canvas

from experiments.run.curves import save
from experiments.run.rendering import DASH, to_markdown
from experiments.tables.exhibit import Figure, ListedRun
from experiments.tables.notes import absences, conditions, sentence
from experiments.tables.publishing import Rendering


@dataclass(frozen=True)
class Drawing:
    """A drawn figure, the numbers behind it, one row each, and sentences for its caption."""

    canvas: Canvas
    data: pd.DataFrame
    says: Sequence[str] = ()
    table: pd.DataFrame | None = None  # of ready cells, below the picture


def render_figure(figure: Figure, runs: Sequence[ListedRun]) -> Rendering:
    """The figure of those runs that are finished, in all its formats."""
    done = [run for run in runs if run.result is not None]
    above = [sentence(note) for note in figure.note]
    below = [*conditions(runs), *absences(runs)]
    filled = {" ".join(run.place.values()): run.result is not None for run in runs}
    if not done:
        notes = [*above, *below]
        return Rendering(notes, {"md": _markdown(figure, DASH, notes)}, filled)
    drawing: Drawing = instantiate(figure.drawing, _partial_=True, _convert_="all")(done)
    notes = [*above, *drawing.says, *below]
    files = save(drawing.canvas)
    files["csv"] = drawing.data.to_csv(index=False).encode()
    table = [] if drawing.table is None else [to_markdown(drawing.table).rstrip()]
    picture = f"![{figure.full_title}]({figure.name}.png)"
    files["md"] = _markdown(figure, picture, [*table, *notes])
    panels = {} if drawing.table is None else {"": drawing.table}
    return Rendering(notes, files, filled, panels)


def _markdown(figure: Figure, picture: str, notes: Sequence[str]) -> bytes:
    return ("\n\n".join([f"**{figure.full_title}**", picture, *notes]) + "\n").encode()
