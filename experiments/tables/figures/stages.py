"""Where and when a concept sits: its scores by part of the network and stage of the trajectory.

(The paper has no such figure; its Appendix A leaves the timestep open.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from omegaconf import OmegaConf

from cad.attribution import stored_scores
from cad.errors import UserError
from cad.store import Store
from cad.trajectories import STAGES
from cad.weight_edit import WeightEdit
from experiments.run.curves import PAGE, new_canvas
from experiments.run.rendering import display_words, join_concepts
from experiments.run.results import EDIT, read_json
from experiments.tables.exhibit import ListedRun, by_number
from experiments.tables.figures.components import WAY
from experiments.tables.figures.drawing import Drawing

STAGE = "stage"  # the axis
SIGNS = {"positive": ("Oranges", 1), "negative": ("Blues", -1)}  # colours, direction
ROW = 0.17  # inches
PLACE = re.compile(  # the block, and what the weight is in it
    r"^(?P<block>\w*?blocks?(\.\d+)?)\."
    r"(attentions\.\d+\.transformer_blocks\.\d+\.|resnets\.\d+\.)?(?P<kind>.+)\.weight$"
)


def draw_stages(runs: Sequence[ListedRun]) -> Drawing:
    """A map for each sign: shares of a concept's score by place and stage, mean over concepts.

    Of every concept that was run at all stages; the axis "stage" has their names. Shares of a sign
    add up to 100 % over places and stages. Raises UserError where no concept has all stages, and
    where scores are no longer in the store.
    """
    sums = [score_sums(run.folder).assign(stage=run.place[STAGE]) for run in runs]
    frame = pd.concat(sums, ignore_index=True)
    whole = frame.groupby("concept")[STAGE].transform("nunique") == len(STAGES)
    frame = frame[whole].copy()
    if frame.empty:
        raise UserError(f"no concept has the scores of all stages yet: {', '.join(STAGES)}")
    total = frame.groupby(["concept", "sign"])["score"].transform("sum")
    frame["share"] = 100 * frame["score"] / total
    canvas = new_canvas(PAGE, 0.8 + ROW * frame["place"].nunique())
    panels = canvas.subplots(1, len(SIGNS), sharey=True)
    weights = frame.drop_duplicates("place").set_index("place")["weights"]
    weights = weights.loc[sorted(weights.index, key=_way)]
    table = pd.DataFrame({"of the weights, %": 100 * weights / weights.sum()})
    for panel, (sign, (colours, _)) in zip(panels, SIGNS.items(), strict=True):
        means = frame[frame["sign"] == sign].pivot_table("share", "place", STAGE)
        means = means.loc[list(weights.index), list(STAGES)]
        _map(panel, means, colours)
        panel.set_title(f"{sign} scores, %")
        table = table.join(means.add_prefix(f"{sign}, ").add_suffix(", %"))
    concepts = ", ".join(display_words(each) for each in dict.fromkeys(frame["concept"]))
    says = [
        f"Shares of the sum of a concept's positive, and of its negative, scores; mean of "
        f"{concepts}. Stages are thirds of the timesteps, early is the noisiest."
    ]
    return Drawing(canvas, frame, says, table.map("{:.1f}".format).reset_index())


def score_sums(result: Path) -> pd.DataFrame:
    """A row for each place and sign: the sum of a run's scores there, from the store of scores.

    Raises UserError as `cad.attribution.stored_scores`.
    """
    paths = OmegaConf.load(result / "config.yaml").paths
    store = Store(result.parent / os.path.relpath(paths.scores, paths.runs))
    scores = stored_scores(WeightEdit.load(result / EDIT).provenance, store)
    rows = [
        {
            "concept": join_concepts(read_json(result / "metrics.json")),
            "place": place(name),
            "sign": sign,
            "score": float((direction * score).clamp(min=0).double().sum()),
            "weights": score.numel(),
        }
        for name, score in scores.items()
        for sign, (_, direction) in SIGNS.items()
    ]
    keys = ["concept", "place", "sign"]
    return pd.DataFrame(rows).groupby(keys, sort=False).sum().reset_index()


def place(name: str) -> str:
    """ "up 1 ff.net.2" of up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight."""
    found = PLACE.match(name)
    if found is None:
        return name
    block = re.sub(r"_?blocks?", "", found["block"]).replace(".", " ")
    return f"{block} {found['kind']}".strip()


def _way(place: str) -> list[str | int]:
    """The key that sorts places as the network has them; of a UNet by the way through it."""
    block = place.partition(" ")[0]
    return [WAY.index(block) if block in WAY else 0, *by_number(place)]


def _map(panel: Axes, shares: pd.DataFrame, colours: str) -> None:
    panel.imshow(shares, cmap=colours, aspect="auto", vmin=0, alpha=0.8)
    panel.set_xticks(range(len(STAGES)), STAGES)
    panel.set_yticks(range(len(shares)), list(shares.index))
    for row, values in enumerate(shares.to_numpy()):
        for column, value in enumerate(values):
            panel.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6)
