"""Published prompt sets: a file is fetched once, verified, and read by its columns.

The way of a file: `PromptFile.build` takes its bytes from a local copy, the cache or the network,
compares their SHA-256 with the pinned one, decodes them, and makes every row a `Prompt` by the
set's rules (whose seed, guidance and size: the row's own, or one for all). Nothing is read from a
file that is not the pinned one, unless `prompts.sha256=null` asks for that.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cad.errors import UserError
from evaluation.prompt_sources import PromptSource, check_digest
from evaluation.prompts import Prompt, PromptSet

FILE = "file"  # a rule's value: each row's own
INTEGER_LIMIT = 2**63  # of random generators' seeds
SHA256 = re.compile(r"[0-9a-f]{64}")

Row = dict[str, str]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """How a CSV file is written: UTF-8, commas, double quotes; fields may hold line breaks."""

    header: Sequence[str] | None  # the columns, where the first line does not name them
    undecodable: Literal["error", "replace"]  # bytes that are not UTF-8: refused, or U+FFFD each
    empty: Literal["error", "skip"]  # rows whose prompt is empty: refused, or left out

    def __post_init__(self) -> None:
        _check_choice("prompts.layout.undecodable", self.undecodable, ("error", "replace"))
        _check_choice("prompts.layout.empty", self.empty, ("error", "skip"))

    def rows(self, data: bytes, origin: str) -> Iterator[tuple[int, Row]]:
        """Each row by column, after the number of its last line. UserError for broken ones."""
        reader = csv.DictReader(
            io.StringIO(self._decode(data, origin), newline=""),
            fieldnames=list(self.header) if self.header else None,
            strict=True,
        )
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{origin}, line {reader.line_num}: the row has more or fewer fields than "
                        f"the file has columns ({', '.join(reader.fieldnames or [])}). Mend the row"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(
                f"{origin}, line {reader.reader.line_num}: not a CSV row ({error}). Mend the file"
            ) from error

    def _decode(self, data: bytes, origin: str) -> str:
        try:
            return data.decode("utf-8-sig", "strict" if self.undecodable == "error" else "replace")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise UserError(
                f"{origin}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8. Save the "
                "file as UTF-8, or set prompts.layout.undecodable=replace"
            ) from error


@dataclass(frozen=True)
class Columns:
    """What a file calls its columns; None: it has no such column."""

    prompt: str
    id: str | None
    group: str | None
    seed: str | None
    guidance: str | None
    height: str | None
    width: str | None


@dataclass(frozen=True)
class Rules:
    """What each image is made with: one value for all of the set, or "file" for the row's own."""

    group: str
    seed: int | str
    guidance: float | str | None  # None: the sampler's
    size: str | None  # None: the model's own
    truncate: bool  # cut prompts that are longer than the text encoder takes; else refuse them

    def __post_init__(self) -> None:
        if not (isinstance(self.seed, int) and 0 <= self.seed < INTEGER_LIMIT):
            _check_choice("prompts.rules.seed", self.seed, (FILE,), "a whole number from 0 on, ")
        guidance = self.guidance
        if guidance is not None and (isinstance(guidance, str) or not math.isfinite(guidance)):
            _check_choice("prompts.rules.guidance", guidance, (FILE,), "null, a number, ")
        if self.size is not None:
            _check_choice("prompts.rules.size", self.size, (FILE,), "null, ")

    def wanted(self) -> list[str]:
        """The columns of `Columns` that the rules read."""
        read = [name for name in ("group", "seed", "guidance") if getattr(self, name) == FILE]
        return [*read, "height", "width"] if self.size == FILE else read


@dataclass(frozen=True)
class PromptFile(PromptSet):
    """The prompts of a published file, in its order.

    `path` is a local copy to take instead of the source's; `sha256` is what either must have, in
    hexadecimal, None to take what there is. Raises UserError for a rule that needs a column which
    the file has not.
    """

    name: str
    source: PromptSource
    path: str | None
    sha256: str | None
    layout: Layout
    columns: Columns
    rules: Rules

    def __post_init__(self) -> None:
        if self.sha256 is not None and not SHA256.fullmatch(self.sha256):
            raise UserError(
                f"prompts.sha256={self.sha256} is no SHA-256, which has 64 digits 0-9 and a-f; "
                "null takes any file"
            )
        for name in self.rules.wanted():
            if getattr(self.columns, name) is None:
                rule = "size" if name in ("height", "width") else name
                raise UserError(
                    f"prompts.rules.{rule}=file, but the set {self.name} has no such column: set "
                    f"prompts.columns.{name}, or prompts.rules.{rule} to one value for all images"
                )

    def build(self) -> list[Prompt]:
        """All prompts of the file, which is downloaded the first time.

        Raises UserError for a file that cannot be had, is another, or has a row that is broken.
        """
        data, origin = self._read()
        if self.sha256 is None:
            logger.warning("prompts.sha256=null: %s are not verified", origin)
        rows = list(self.layout.rows(data, origin))
        if rows:
            self._check_columns(rows[0][1], origin)
        prompts, skipped = [], 0
        for line, row in rows:
            where = f"{origin}, line {line}"
            if row[self.columns.prompt].strip():
                prompts.append(self._prompt(row, where))
            elif self.layout.empty == "skip":
                skipped += 1
            else:
                raise UserError(
                    f"{where}: the prompt is empty. Mend the row, or set prompts.layout.empty=skip"
                )
        if skipped:
            logger.info("%s: %d rows have no prompt and are left out", self.name, skipped)
        return prompts

    def _read(self) -> tuple[bytes, str]:
        """The verified bytes, and what messages call the file."""
        if self.path is None:
            return self.source.read(self.sha256), f"the prompts of {self.source.address}"
        origin = f"prompts.path={self.path}"
        try:
            data = Path(self.path).expanduser().read_bytes()
        except OSError as error:
            raise UserError(
                f"{origin} cannot be read: {error.strerror}. prompts.path=null downloads the file "
                f"from {self.source.address}"
            ) from error
        check_digest(data, self.sha256, origin, f"It is not the file of {self.source.address}. ")
        return data, origin

    def _check_columns(self, row: Row, origin: str) -> None:
        named = {
            name: getattr(self.columns, name) for name in ("prompt", "id", *self.rules.wanted())
        }
        for name, column in named.items():
            if column is not None and column not in row:
                raise UserError(
                    f"{origin} has no column {column!r}; it has: {', '.join(row)}. Set "
                    f"prompts.columns.{name} to one of these"
                )

    def _prompt(self, row: Row, where: str) -> Prompt:
        rules, cells = self.rules, _Cells(row, self.columns, where)
        size = None
        if rules.size == FILE:
            size = cells.integer("height", 1, "size=null"), cells.integer("width", 1, "size=null")
        return Prompt(
            text=row[self.columns.prompt],
            seed=cells.integer("seed", 0, "seed=0") if isinstance(rules.seed, str) else rules.seed,
            group=cells.group() if rules.group == FILE else rules.group,
            guidance=cells.guidance() if isinstance(rules.guidance, str) else rules.guidance,
            size=size,
            truncate=rules.truncate,
            id=None if self.columns.id is None else cells.text("id"),
        )


class _Cells:
    """A row's values by the names of `Columns`. UserError, naming the row, for unreadable ones."""

    def __init__(self, row: Row, columns: Columns, where: str) -> None:
        self._row = row
        self._columns: dict[str, str] = asdict(columns)
        self._where = where

    def text(self, name: str) -> str:
        return self._row[self._columns[name]]

    def integer(self, name: str, low: int, remedy: str) -> int:
        text = self.text(name).strip()
        if not text.isdecimal() or not low <= int(text) < INTEGER_LIMIT:
            raise self._error(name, f"a whole number from {low} on", remedy)
        return int(text)

    def guidance(self) -> float:
        try:
            value = float(self.text("guidance"))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self._error("guidance", "a finite number", "guidance=null")
        return value

    def group(self) -> str:
        """As concepts are named: "Van Gogh" is van_gogh."""
        name = re.sub(r"[^a-z0-9]+", "_", self.text("group").lower()).strip("_")
        if not name:
            raise self._error("group", "a name", "group=NAME")
        return name

    def _error(self, name: str, wanted: str, remedy: str) -> UserError:
        return UserError(
            f"{self._where}: {self._columns[name]}={self.text(name)!r} is not {wanted}. Mend the "
            f"row, or set prompts.rules.{remedy} for all images"
        )


def _check_choice(key: str, value: object, choices: Sequence[str], others: str = "") -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is unknown; allowed: {others}{', '.join(choices)}")
