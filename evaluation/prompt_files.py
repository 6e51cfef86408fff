"""Published prompt sets: a file is fetched once, verified, and read by its columns.

Nothing is read from a file that is not the pinned one, unless `prompts.sha256=null` asks for that.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cad.checks import Rule, check, finite, one_of, optional, seed
from cad.errors import UserError
from cad.identity import Identified, answer
from evaluation.prompt_sources import LOCAL_COPY, PromptSource, digest, read_file
from evaluation.prompts import Prompt, PromptSet

FILE = "file"  # a rule's value: each row's own
RULES = {"height": "size", "width": "size"}  # of columns; the others' have their names
INTEGER_LIMIT = 2**63  # of random generators' seeds
Row = dict[str, str]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout(Identified):
    """How a CSV file is written: UTF-8, commas, double quotes; fields may hold line breaks."""

    header: Sequence[str] | None  # the columns, where the first line does not name them
    undecodable: Literal["error", "replace"]  # bytes that are not UTF-8: refused, or U+FFFD each
    empty: Literal["error", "skip"]  # rows whose prompt is empty: refused, or left out

    def __post_init__(self) -> None:
        undecodable, empty = one_of(("error", "replace")), one_of(("error", "skip"))
        check(self, "prompts.layout", undecodable=undecodable, empty=empty)

    def rows(self, data: bytes, origin: str) -> Iterator[tuple[int, Row]]:
        """Each row by column, after the number of its last line. UserError for broken ones."""
        try:
            errors = "strict" if self.undecodable == "error" else "replace"
            text = data.decode("utf-8-sig", errors)
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise UserError(
                f"{origin}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8. Save the "
                "file as UTF-8, or set prompts.layout.undecodable=replace"
            ) from error
        if "\0" in text:
            line = text[: text.index("\0")].count("\n") + 1
            raise UserError(f"{origin}, line {line}: a NUL byte, which no text has. Mend the file")
        fieldnames = list(self.header) if self.header else None
        reader = csv.DictReader(io.StringIO(text, newline=""), fieldnames, strict=True)
        try:
            columns = reader.fieldnames or ()
            if len({*columns}) < len(columns):
                raise csv.Error(f"two columns of one name: {', '.join(columns)}")
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(f"more or fewer fields than columns: {reader.fieldnames}")
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(
                f"{origin}, line {reader.reader.line_num}: not a CSV row ({error}). Mend the file"
            ) from error


@dataclass(frozen=True)
class Columns(Identified):
    """The names of a file's columns; None: it has no such column."""

    prompt: str
    id: str | None
    group: str | None
    seed: str | None
    guidance: str | None
    height: str | None
    width: str | None


@dataclass(frozen=True)
class Rules(Identified):
    """Where each image's settings come from: one value for all, or "file" for the row's own."""

    group: str
    seed: int | str
    guidance: float | str | None  # None: the sampler's
    size: str | None  # None: the model's own
    truncate: bool  # cut prompts that are longer than the text encoder takes; else refuse them

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {"seed": seed, "guidance": optional(finite)}
        own = {name: rule for name, rule in rules.items() if getattr(self, name) != FILE}
        check(self, "prompts.rules", size=optional(one_of((FILE,))), **own)

    def wanted(self) -> list[str]:
        """The columns of `Columns` that the rules read."""
        read = [name for name in ("group", "seed", "guidance") if getattr(self, name) == FILE]
        return [*read, "height", "width"] if self.size == FILE else read


@dataclass(frozen=True)
class PromptFile(PromptSet):
    """The prompts of a published file, in its order.

    `path` is a local copy to take instead of the source's; `sha256` is what either must have, in
    hexadecimal, None to take what there is.
    """

    name: str
    source: PromptSource
    path: str | None
    sha256: str | None
    layout: Layout
    columns: Columns
    rules: Rules

    def __post_init__(self) -> None:
        for name in self.rules.wanted():
            if getattr(self.columns, name) is None:
                rule = RULES.get(name, name)
                raise UserError(
                    f"prompts.rules.{rule}=file, but the set {self.name} has no such column: set "
                    f"prompts.columns.{name}, or prompts.rules.{rule} to one value for all images"
                )

    def settings(self) -> dict[str, Any]:
        """The file and how it is read. A pinned file is its hash, wherever it lies."""
        file = self.sha256
        if file is None and self.path is not None:
            file = digest(self._local_bytes())
        found = {name: answer(getattr(self, name)) for name in ("layout", "columns", "rules")}
        return found | {"name": self.name, "file": file or answer(self.source)}

    def build(self) -> list[Prompt]:
        """All prompts of the file. UserError if it cannot be had, is another, or is broken."""
        if self.path is None:
            data, origin = self.source.read(self.sha256), f"the prompts of {self.source.address}"
        else:
            data, origin = self._local_bytes(), f"prompts.path={self.path}"
        if self.sha256 is None:
            logger.warning("prompts.sha256=null: %s are not verified", origin)
        elif digest(data) != self.sha256:
            raise UserError(
                f"{origin} has the SHA-256 {digest(data)}, expected is {self.sha256} "
                f"(prompts.sha256): it is another file than that of {self.source.address}. Give "
                f"{LOCAL_COPY}, or take this one as it is with prompts.sha256=null"
            )
        rows = list(self.layout.rows(data, origin))
        for name in ("prompt", "id", *self.rules.wanted()):
            column = getattr(self.columns, name)
            if rows and column is not None and column not in rows[0][1]:
                raise UserError(
                    f"{origin} has no column {column!r}; it has: {', '.join(rows[0][1])}. Set "
                    f"prompts.columns.{name} to one of these"
                )
        return self._prompts(rows, origin)

    def _prompts(self, rows: Sequence[tuple[int, Row]], origin: str) -> list[Prompt]:
        prompts = []
        for line, row in rows:
            where = f"{origin}, line {line}"
            if row[self.columns.prompt].strip():
                prompts.append(self._prompt(row, where))
            elif self.layout.empty == "error":
                raise UserError(
                    f"{where}: the prompt is empty. Mend the row, or set prompts.layout.empty=skip"
                )
        return prompts

    def _local_bytes(self) -> bytes:
        remedy = f"prompts.path=null takes the file of {self.source.address}"
        return read_file(Path(str(self.path)).expanduser(), f"prompts.path={self.path}", remedy)

    def _prompt(self, row: Row, where: str) -> Prompt:
        own = {name: self._own(name, row, where) for name in self.rules.wanted()}
        return Prompt(
            text=row[self.columns.prompt],
            seed=own.get("seed", self.rules.seed),
            group=own.get("group", self.rules.group),
            guidance=own.get("guidance", self.rules.guidance),
            size=(own["height"], own["width"]) if self.rules.size == FILE else None,
            truncate=self.rules.truncate,
            id=None if self.columns.id is None else row[self.columns.id],
        )

    def _own(self, name: str, row: Row, where: str) -> Any:
        """What the row has in a column of `Columns`."""
        column = getattr(self.columns, name)
        try:
            return CELLS[name](row[column])
        except ValueError as error:
            raise UserError(
                f"{where}: {column}={row[column]!r} is not allowed: {error}. Mend the row, or set "
                f"prompts.rules.{RULES.get(name, name)} to one value for all images"
            ) from error


def _whole(text: str, low: int) -> int:
    if not (text.isascii() and text.strip().isdecimal()) or not low <= int(text) < INTEGER_LIMIT:
        raise ValueError(f"it is not a whole number from {low} on")
    return int(text)


def _finite(text: str) -> float:
    if not text.isascii() or not math.isfinite(float(text)):
        raise ValueError("it is not a finite number")
    return float(text)


def _name(text: str) -> str:
    """As concepts are named: "Van Gogh" is van_gogh."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    if not name:
        raise ValueError("it is not a name")
    return name


CELLS: dict[str, Callable[[str], Any]] = {
    "group": _name,
    "seed": partial(_whole, low=0),
    "guidance": _finite,
    "height": partial(_whole, low=1),
    "width": partial(_whole, low=1),
}
