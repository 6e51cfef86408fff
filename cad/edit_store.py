"""Finished edits, kept on disk: measuring an edit in another way does not make it again.

A file is addressed by the hash of the edit's provenance: model, method, settings, concepts, device
and libraries. What making it took, and how it went, lies beside it.
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

        `cost.cached` tells which. Raises what `Edit.__call__` raises.
        """
        path = self.path(method, model, concepts)
        notes = path.with_suffix(".json")
        if path.is_file() and notes.is_file():
            try:
                return _read(path, notes), path
            except (UserError, LookupError, TypeError, ValueError) as error:
                log.warning("the edit in %s is damaged (%s): making it again", path, error)
        first, *more = concepts
        edit = method(model, first, *more)
        with atomic_path(notes) as temporary:  # first: an edit in its place always has its notes
            written = {"cost": asdict(edit.cost), "history": list(edit.history)}
            temporary.write_text(json.dumps(written) + "\n", encoding="utf-8")
        edit.save(path)
        method.clean_up(model, concepts)
        return edit, path

    def path(self, method: Edit, model: DiffusionModel, concepts: Sequence[Concept]) -> Path:
        """Where the edit belongs, whether or not it is there."""
        return self.root / f"{settings_digest(method.provenance(model, concepts))}.safetensors"


def _read(path: Path, notes: Path) -> WeightEdit:
    written = json.loads(notes.read_text(encoding="utf-8"))
    cost = replace(Cost(**written["cost"]), cached=True)
    edit = replace(WeightEdit.load(path), cost=cost, history=tuple(written["history"]))
    log.info("edit taken from %s", path)
    return edit
