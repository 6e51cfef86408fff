"""Where in the network a concept's top components sit. (The paper has no such figure.)"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from cad.errors import UserError
from experiments.figures.figure import Drawing, Drawn
from experiments.figures.style import BLUE, ORANGE, new_canvas
from experiments.items.item import Place
from experiments.items.plan import Run
from experiments.rendering import join_concepts
from experiments.results import read_json

SIGNS = {"positive": (ORANGE, 1), "negative": (BLUE, -1)}  # values of the axis: colour, direction
BAR = 0.19  # inches
WAY = ("down", "mid", "up")  # of a UNet, whose modules are in another order
SHORTER = (  # of parameter names
    (r"\.weight$", ""),
    (r"_blocks?\b", ""),
    (r"\.attentions", ""),
    (r"\.transformer\.(\d+)", r".\1"),
)


class ComponentPlaces(Drawing):
    """A bar per weight matrix, in the network's order: its share of the top components.

    `axis` names the one whose values are "positive" and "negative": runs whose edits choose the top
    of the whole model (`ratio.per=model`), by either sign. A bar is the mean over concepts, a dot
    one of them; a black line is the share that a choice without preference would have.
    """

    def __init__(self, axis: str = "sign") -> None:
        self.axis = axis

    def draw(self, runs: Sequence[tuple[Place, Run]]) -> Drawn:
        frame = pd.concat(
            [component_shares(run).assign(sign=place[self.axis]) for place, run in runs],
            ignore_index=True,
        )
        names = sorted(dict.fromkeys(frame["weight"]), key=_place)
        canvas = new_canvas(7.0, 1.1 + BAR * len(names))
        panel = canvas.subplots()
        for sign, found in frame.groupby("sign", sort=False):
            colour, direction = SIGNS[str(sign)]
            _bars(panel, found, names, colour, direction, str(sign))
        concepts = ", ".join(dict.fromkeys(frame["concept"]))
        says = [
            f"Shares of each weight matrix in the top {100 * frame['ratio'].iloc[0]:g} % of all "
            f"weights of component={frame['component'].iloc[0]}; bars: mean of {concepts}; dots: "
            "each; black lines: the matrix's share of the weights."
        ]
        return Drawn(canvas, frame, [*says, *_largest(frame)])


def component_shares(run: Run) -> pd.DataFrame:
    """A row for each weight of the run's component group: its share of what the edit chose.

    Also its share of all weights of the group, "expected". Shares are in %. UserError for an edit
    whose budget is not the whole model's, which has the same share everywhere.
    """
    metrics = read_json(run.folder / "metrics.json")
    edit = metrics["edit"]
    if edit["per"] != "model":
        raise UserError(f"{run.folder} chose per {edit['per']}: this figure needs ratio.per=model")
    weights = pd.DataFrame(edit["weights"])  # name, changed, of
    return pd.DataFrame(
        {
            "concept": join_concepts(metrics),
            "component": edit["component"],
            "ratio": edit["ratio"],
            "weight": weights["name"],
            "share": 100 * weights["changed"] / weights["changed"].sum(),
            "expected": 100 * weights["of"] / weights["of"].sum(),
        }
    )


def _bars(
    panel: Axes, found: pd.DataFrame, names: Sequence[str], colour: str, direction: int, sign: str
) -> None:
    rows = found["weight"].map({name: place for place, name in enumerate(names)})
    mean = found.groupby("weight")["share"].mean()
    expected = found.groupby("weight")["expected"].first()
    places = range(len(names))
    panel.barh(
        places, [direction * mean[name] for name in names], color=colour, alpha=0.7, label=sign
    )
    panel.plot(direction * found["share"], rows, ".", color=colour, markersize=4)
    edges = [direction * expected[name] for name in names]
    panel.vlines(edges, [p - 0.4 for p in places], [p + 0.4 for p in places], color="black")
    panel.set_yticks(list(places), [_short(name) for name in names], fontsize=7)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    panel.set_xlabel("share of the top components, %: negative to the left, positive to the right")
    panel.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def _largest(frame: pd.DataFrame) -> list[str]:
    """A sentence for each sign: the matrix that has most beyond its size."""
    says = []
    for sign, found in frame.groupby("sign", sort=False):
        means = found.groupby("weight")[["share", "expected"]].mean()
        name = str((means["share"] / means["expected"]).idxmax())
        share, expected = float(means["share"][name]), float(means["expected"][name])
        says.append(
            f"{str(sign).capitalize()} components are densest in {name}: {share:.1f} % of them, "
            f"where {expected:.1f} % of the weights are."
        )
    return says


def _place(name: str) -> int:
    """Where in a UNet a weight is; 0 in a transformer, whose order is its own."""
    block = name.partition("_")[0]
    return WAY.index(block) if block in WAY else 0


def _short(name: str) -> str:
    for pattern, replacement in SHORTER:
        name = re.sub(pattern, replacement, name)
    return name
