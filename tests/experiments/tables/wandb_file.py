"""Reads the file that W&B writes offline: LevelDB's log format, with a protocol buffer a record.

Blocks of 32 KiB after a header of 7 bytes; a piece of a record has a checksum (4 bytes), its length
(2) and its type (1: whole, 2: first, 3: middle, 4: last).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
HEADER = 7  # bytes, of the file and of a piece
PATIENCE = 60.0  # seconds


@dataclass
class OfflineRun:
    """What one file tells of its run."""

    run: Any
    values: dict[str, Any] = field(default_factory=dict)  # the last logged, by name
    artifacts: list[tuple[str, str]] = field(default_factory=list)  # name, type
    exit_code: int | None = None


def read_offline_run(path: Path) -> OfflineRun:
    """The run in a file `run-ID.wandb`, which W&B's service may still write for a moment."""
    given_up = time.monotonic() + PATIENCE
    while (found := _read(path)).exit_code is None and time.monotonic() < given_up:
        time.sleep(0.1)
    return found


def _read(path: Path) -> OfflineRun:
    found = OfflineRun(None)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run" and found.run is None:
            found.run = record.run
        elif kind == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                found.values[name] = json.loads(item.value_json)
        elif kind == "artifact":
            found.artifacts.append((record.artifact.name, record.artifact.type))
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def records(path: Path) -> Iterator[Any]:
    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too short for a piece: padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += HEADER
        if at + length > len(data):
            return
        whole += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""
