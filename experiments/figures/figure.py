"""What a figure is: the schema of conf/figure/*.yaml, and the contract of what draws it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from hydra.utils import instantiate
from matplotlib.figure import Figure as Canvas
from omegaconf import MISSING, DictConfig

from experiments.items.item import (
    MINIATURE,
    Item,
    ItemConfig,
    Place,
    check_axes,
    read_config,
    read_sweep,
)
from experiments.items.plan import Run


@dataclass
class FigureConfig(ItemConfig):
    """conf/figure/*.yaml."""

    name: str = MISSING  # of its files
    called: str = MISSING  # "Figure 2"
    target: str = MISSING  # of the Makefile
    drawing: dict[str, Any] = field(default_factory=dict)  # _target_ and settings of a Drawing


@dataclass(frozen=True)
class Drawn:
    """A figure, the numbers behind it, one row each, and sentences for its caption."""

    canvas: Canvas
    data: pd.DataFrame
    says: Sequence[str] = ()


class Drawing(ABC):
    """Draws what the finished ones of a figure's runs have measured, and reads nothing else."""

    @abstractmethod
    def draw(self, runs: Sequence[tuple[Place, Run]]) -> Drawn:
        """The figure of finished runs, at least one, with their places."""


@dataclass(frozen=True)
class Figure(Item):
    """A figure for its models: the paper's, or the miniature, perhaps the fast one."""

    config: FigureConfig
    drawing: Drawing

    @property
    def called(self) -> str:
        return self.config.called

    @property
    def stem(self) -> str:
        return self.config.name

    @property
    def command(self) -> str:
        return f"make {self.config.target} MODEL={MINIATURE}"

    @property
    def subject(self) -> str:
        return self.config.title


def read_figure(node: DictConfig, model: str | None, fast: bool) -> Figure:
    """The figure that a configuration describes, for its own models or the one that is named.

    Raises UserError for a model that the figure does not have, and OmegaConf's error for a key that
    no figure has.
    """
    config = read_config(node, FigureConfig)
    sweep = read_sweep(config, config.called, model, fast)
    where = f"conf/figure of {config.called}"
    check_axes(where, [axis for skip in sweep.skip for axis in skip.when], sweep.axes)
    return Figure(sweep, config, instantiate(config.drawing, _convert_="all"))
