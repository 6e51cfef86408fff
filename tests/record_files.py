"""Reads the records of a result as a user would."""

from pathlib import Path

from safetensors.numpy import load_file

from evaluation.evaluators.base import Record
from experiments.run.results import ARRAYS, RECORDS, read_lines


def read_records(folder: Path) -> list[Record]:
    """The records that `write_records` was given."""
    records: list[Record] = read_lines(folder / RECORDS)
    if not (folder / ARRAYS).exists():
        return records
    for name, rows in load_file(folder / ARRAYS).items():
        metric, state, key = name.split(".")
        owners = [r for r in records if (r["metric"], r["state"]) == (metric, state)]
        for record, row in zip(owners, rows, strict=True):
            record[key] = row
    return records
