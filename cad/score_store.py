"""Attribution scores, kept on disk: a sweep over ratios costs one attribution.

A file is addressed by the hash of everything that determines the scores and nothing else: model,
prompts, objective, attribution settings (not ratio or selection), device and libraries. Of several
processes that need the same scores one computes them, and the others wait (`cad.locks`).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cad.attribution import Attribution
from cad.digests import settings_digest, tensors_digest
from cad.files import atomic_path
from cad.instrument import Cost, measure
from cad.locks import locked
from cad.models.base import DiffusionModel
from cad.objectives import Objective
from cad.runtime import describe_runtime

log = logging.getLogger(__name__)

VERSION = 2  # raise it when the scores of equal settings change


@dataclass(frozen=True)
class Scored:
    """Scores {name: (out, in) float32}, and what computing them took, then or now."""

    scores: dict[str, Tensor]
    cost: Cost


def compute_scores(model: DiffusionModel, objective: Objective, attribution: Attribution) -> Scored:
    """`Attribution.scores`, with what they cost."""
    with measure(model.device) as meter:
        scores = attribution.scores(model, objective)
    return Scored(scores, meter.cost)


class ScoreStore:
    """A folder of score files. Writes atomically; a damaged file is reported and made again."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def scored(
        self, model: DiffusionModel, objective: Objective, attribution: Attribution
    ) -> Scored:
        """Scores from the folder, or computed and kept there; `cost.cached` tells which.

        At the attribution's place. Waits for another process that computes them. Raises what
        `Attribution.scores` raises, and UserError for a folder without locks.
        """
        path = self.path(model, objective, attribution)
        place = attribution.place(model)
        kept = self._kept(path, place)
        if kept is not None:
            return kept
        with locked(path.with_suffix(".lock"), "another process is computing these scores"):
            kept = self._kept(path, place)
            if kept is not None:
                return kept
            scored = compute_scores(model, objective, attribution)
            self._write(path, scored)
        return scored

    def path(self, model: DiffusionModel, objective: Objective, attribution: Attribution) -> Path:
        """Where the scores belong, whether or not they are there."""
        key = {
            "version": VERSION,
            "model": model.provenance(),
            "objective": objective.describe(),
            "attribution": attribution.settings(),
            **describe_runtime(model.device),
        }
        return self.root / f"{settings_digest(key)}.safetensors"

    def _kept(self, path: Path, device: torch.device) -> Scored | None:
        """The scores in the file; None, with a warning if it is damaged, where there are none."""
        if not path.is_file():
            return None
        try:
            return self._read(path, device)
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            log.warning("the scores in %s are damaged (%s): computing them again", path, error)
            return None

    def _read(self, path: Path, device: torch.device) -> Scored:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("cad", "{}"))
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("sha256") != tensors_digest(scores.items()):
            raise ValueError("its content does not match its hash")
        log.info("scores taken from %s", path)
        cost = replace(Cost(**header["cost"]), cached=True)
        return Scored({name: score.to(device) for name, score in scores.items()}, cost)

    def _write(self, path: Path, scored: Scored) -> None:
        kept = {name: score.cpu().contiguous() for name, score in scored.scores.items()}
        header = {"sha256": tensors_digest(kept.items()), "cost": asdict(scored.cost)}
        with atomic_path(path) as temporary:
            save_file(kept, temporary, {"cad": json.dumps(header, sort_keys=True)})
