"""Finished edits, kept on disk: measuring an edit in another way does not make it again.

A file is addressed by the hash of the edit's provenance: model, method, settings, concepts, device
and libraries. What making it took, and how it went, lies beside it. Of several processes that need
the same edit one makes it, and the others wait (`cad.locks`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cad.concepts import Concept
from cad.digests import settings_digest
from cad.edits import Edit
from cad.errors import UserError
from cad.files import atomic_path
from cad.instrument import Cost
from cad.locks import locked
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit

log = logging.getLogger(__name__)


class EditStore:
    """A folder of edits. Writes atomically; a damaged file is reported and made again."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def edit(
        self, method: Edit, model: DiffusionModel, concepts: Sequence[Concept]
    ) -> tuple[WeightEdit, Path]:
        """The method's edit from the folder, or made and kept there, and its file.

        `cost.cached` tells which. Waits for another process that makes it. Raises what
        `Edit.__call__` raises, and UserError for a folder without locks.
        """
        path = self.path(method, model, concepts)
        kept = _kept(path)
        if kept is not None:
            return kept, path
        with locked(path.with_suffix(".lock"), f"another process is making this {method.name}"):
            kept = _kept(path)
            if kept is not None:
                return kept, path
            return self._make(path, method, model, concepts), path

    def path(self, method: Edit, model: DiffusionModel, concepts: Sequence[Concept]) -> Path:
        """Where the edit belongs, whether or not it is there."""
        return self.root / f"{settings_digest(method.provenance(model, concepts))}.safetensors"

    def _make(
        self, path: Path, method: Edit, model: DiffusionModel, concepts: Sequence[Concept]
    ) -> WeightEdit:
        first, *more = concepts
        edit = method(model, first, *more)
        with atomic_path(_notes(path)) as temporary:  # first: an edit in place always has its notes
            written = {"cost": asdict(edit.cost), "history": list(edit.history)}
            temporary.write_text(json.dumps(written) + "\n", encoding="utf-8")
        edit.save(path)
        method.clean_up(model, concepts)
        return edit


def _notes(path: Path) -> Path:
    """Beside an edit: its cost and history."""
    return path.with_suffix(".json")


def _kept(path: Path) -> WeightEdit | None:
    """The edit in the file; None, with a warning if it is damaged, where it cannot be had."""
    if not path.is_file() or not _notes(path).is_file():
        return None
    try:
        return _read(path)
    except (UserError, LookupError, TypeError, ValueError) as error:
        log.warning("the edit in %s is damaged (%s): making it again", path, error)
        return None


def _read(path: Path) -> WeightEdit:
    written = json.loads(_notes(path).read_text(encoding="utf-8"))
    cost = replace(Cost(**written["cost"]), cached=True)
    edit = replace(WeightEdit.load(path), cost=cost, history=tuple(written["history"]))
    log.info("edit taken from %s", path)
    return edit
