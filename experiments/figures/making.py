"""A figure out of its runs' results."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping

from omegaconf import DictConfig

from experiments.figures.figure import Figure
from experiments.figures.style import save
from experiments.items.notes import absences, conditions, end
from experiments.items.overview import Plan
from experiments.items.plan import Overrides, State
from experiments.items.publishing import Rendered
from experiments.rendering import DASH


def make_figure(
    config: DictConfig, figure: Figure, plan: Plan, failed: Mapping[Overrides, str]
) -> Rendered:
    """The figure of what there is; `failed` has the reasons of what is missing."""
    done = [(place, run) for place, run in plan.runs if run.state == State.DONE]
    below = [*conditions(plan.all), *absences(plan.all, failed)]
    notes = [end(note) for note in figure.sweep.notes]
    if not done:
        notes += below
        return Rendered(notes, f"<p>{DASH}</p>", {"md": _markdown(figure, DASH, notes)})
    drawn = figure.drawing.draw(done)
    notes += [*drawn.says, *below]
    files = save(drawn.canvas)
    files["csv"] = drawn.data.to_csv(index=False).encode()
    files["md"] = _markdown(figure, f"![{figure.title}]({figure.name}.png)", notes)
    encoded = base64.b64encode(files["png"]).decode()
    picture = f'<img alt="{html.escape(figure.title)}" src="data:image/png;base64,{encoded}">'
    return Rendered(notes, picture, files)


def _markdown(figure: Figure, picture: str, notes: list[str]) -> bytes:
    return ("\n\n".join([f"**{figure.title}**", picture, *notes]) + "\n").encode()
