"""The published values: results/paper/tableNN.csv, looked up by what a cell is."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

KEYS = ("model", "prompts", "attack", "row", "column", "metric")


class Published:
    """A table's printed cells, as text with the printed digits."""

    def __init__(self, folder: Path, number: int) -> None:
        with (folder / f"table{number:02d}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self._keys = tuple(key for key in KEYS if key in rows[0])
        self._values = {self._key(row): row["value"] for row in rows}

    def __len__(self) -> int:
        return len(self._values)

    def find(self, wanted: Mapping[str, str]) -> str | None:
        """The value printed for {column of the file: its value}; None where nothing is."""
        if not wanted.keys() >= set(self._keys):
            return None
        return self._values.get(self._key(wanted)) or None

    def _key(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[key] for key in self._keys)
