"""A table out of its runs' results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from experiments.items.overview import Plan
from experiments.items.plan import Overrides
from experiments.items.publishing import Rendered
from experiments.tables.cells import build_cells
from experiments.tables.notes import table_notes
from experiments.tables.paper import Published
from experiments.tables.rendering import render_table
from experiments.tables.table import Table


def make_table(
    config: DictConfig, table: Table, plan: Plan, failed: Mapping[Overrides, str]
) -> Rendered:
    """The table of what there is; `failed` has the reasons of what is missing."""
    published = Published(Path(config.published), table.config.number)
    cells = build_cells(table, plan.runs, published)
    return render_table(table, cells, table_notes(table, cells, plan.all, failed))
