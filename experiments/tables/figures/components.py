"""Where in the network a concept's top components sit. (The paper has no such figure.)"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from cad.errors import UserError
from experiments.run.curves import BLUE, ORANGE, PAGE, new_canvas
from experiments.run.rendering import display_words, join_concepts
from experiments.run.results import read_json
from experiments.tables.exhibit import ListedRun
from experiments.tables.figures.drawing import Drawing

SIGNS = {"positive": (ORANGE, 1), "negative": (BLUE, -1)}  # values of the axis: colour, direction
BAR = 0.19  # inches
WAY = ("down", "mid", "up")  # of a UNet, whose modules are in another order
UNSAID = re.compile(r"\.weight$|\.transformer(_blocks?)?(?=\.\d)|_blocks?\b|\.attentions")


def draw_components(runs: Sequence[ListedRun]) -> Drawing:
    """A bar per weight matrix, in the network's order: its share of the top components.

    The axis "sign" has the values "positive" and "negative": runs whose edits choose the top of the
    whole model (`ratio.per=model`). A bar is the mean over concepts, a dot one of them; a black
    line is the share that a choice without preference would have.
    """
    shares = [component_shares(run.folder).assign(sign=run.place["sign"]) for run in runs]
    frame = pd.concat(shares, ignore_index=True)
    names = sorted(dict.fromkeys(frame["weight"]), key=_stage)
    canvas = new_canvas(PAGE, 1.1 + BAR * len(names))
    panel = canvas.subplots()
    for sign, found in frame.groupby("sign", sort=False):
        _bars(panel, found, names, str(sign))
    _label(panel, names)
    concepts = ", ".join(display_words(each) for each in dict.fromkeys(frame["concept"]))
    says = [
        f"Shares of each weight matrix in the top {100 * frame['ratio'].iloc[0]:g} % of all "
        f"weights of component={frame['component'].iloc[0]}; bars: mean of {concepts}; dots: "
        "each; black lines: the matrix's share of the weights."
    ]
    return Drawing(canvas, frame, [*says, *_largest(frame)])


def component_shares(result: Path) -> pd.DataFrame:
    """A row for each weight of the run's component group: its share of what the edit chose.

    Also its share of all weights of the group, "expected". Shares are in %. UserError for an edit
    whose budget is not the whole model's, which has the same share everywhere.
    """
    metrics = read_json(result / "metrics.json")
    edit = metrics["edit"]
    if edit["per"] != "model":
        raise UserError(f"{result} chose per {edit['per']}: this figure needs ratio.per=model")
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


def _bars(panel: Axes, found: pd.DataFrame, names: Sequence[str], sign: str) -> None:
    colour, direction = SIGNS[sign]
    rows = found["weight"].map({name: row for row, name in enumerate(names)})
    mean = found.groupby("weight")["share"].mean()
    expected = found.groupby("weight")["expected"].first()
    places = range(len(names))
    lengths = [direction * mean[name] for name in names]
    panel.barh(places, lengths, color=colour, alpha=0.7, label=sign)
    panel.plot(direction * found["share"], rows, ".", color=colour, markersize=4)
    edges = [direction * expected[name] for name in names]
    panel.vlines(edges, [p - 0.4 for p in places], [p + 0.4 for p in places], color="black")


def _label(panel: Axes, names: Sequence[str]) -> None:
    panel.set_yticks(range(len(names)), [UNSAID.sub("", name) for name in names], fontsize=7)
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


def _stage(name: str) -> int:
    """Where in a UNet a weight is; 0 in a transformer, whose order is its own."""
    block = name.partition("_")[0]
    return WAY.index(block) if block in WAY else 0
