"""CAD on a diffusers pipeline in a few lines: `import cad`, then `cad.erase(pipeline, "church")`.

The pipeline is one of `cad.models.adapters.FAMILIES`, with whatever weights, on its own device and
in its own dtype. It is left as it was: an edit is a value, applied where the user says so. Scores
that are kept in a folder (`store`) are computed once, for every ratio.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cad import attribution as scoring
from cad.attribution import Attribution
from cad.concepts import Concept
from cad.contrast import CADContrast, CADContrastAmplify
from cad.edits import CADAmplify, CADErase
from cad.models.adapters import adapt
from cad.objectives import AmplifyObjective, EraseObjective, Objective
from cad.references import GeneratedImages, References
from cad.selection import Selection
from cad.store import Store
from cad.weight_edit import WeightEdit

RATIO = 0.001  # of each row; paper Sec. 6

Concepts = str | Concept | Sequence[str | Concept]
"""One or several, by their names in prompts or as they are."""


def attribute(
    pipeline: Any,
    concept: str | Concept,
    *,
    amplify: bool = False,
    references: References | None = None,
    store: Path | str | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """The scores w * dJ/dw of the denoiser's weights for a concept (Eq. 3), by parameter name.

    J is Eq. 4's, whose positive components promote the concept, or Eq. 5's (`amplify`), with
    `references` as its images: by default five that the pipeline draws itself. `settings` are those
    of `cad.attribution.Attribution`: component="ff" ("attn1", "attn2", "residual"), steps=50,
    samples=16, seed=0, batch_size=16, gradient_checkpointing=False, ... Returns (out, in) float32
    each. Raises UserError for what cannot work.
    """
    named, attribution = _concept(concept), Attribution(**settings)
    objective: Objective = EraseObjective(named)
    if amplify:
        objective = AmplifyObjective(named, references or GeneratedImages(seed=attribution.seed))
    return scoring.attribute(adapt(pipeline), objective, attribution, _store(store)).scores


def erase(
    pipeline: Any,
    concept: Concepts,
    *,
    keep: Concepts = (),
    ratio: float = RATIO,
    per: str = "row",
    store: Path | str | None = None,
    **settings: Any,
) -> WeightEdit:
    """CAD-Erase (Algorithm 1): the edit that zeroes what promotes a concept, or several, most.

    `ratio`: the share of each `per` ("row" | "layer" | "model") that is zeroed at most;
    `settings` as for `attribute`. `keep`: concepts to spare, each of which is attributed too; their
    mean share of positive scores is taken off before anything is chosen (`cad.contrast`, not in the
    paper), so a larger ratio is needed to erase as much. Raises UserError for what cannot work.
    """
    given = (Attribution(**settings), Selection(ratio, per))
    kept, scores = [each.prompt for each in _concepts(keep)], _store(store)
    plain = CADErase(*given, store=scores)
    method = CADContrast(*given, preserve=kept, store=scores) if kept else plain
    return method(adapt(pipeline), *_concepts(concept))


def amplify(
    pipeline: Any,
    concept: Concepts,
    *,
    keep: Concepts = (),
    ratio: float = RATIO,
    per: str = "row",
    references: References | None = None,
    store: Path | str | None = None,
    **settings: Any,
) -> WeightEdit:
    """CAD-Amplify (Algorithm 2): the edit that zeroes what suppresses a concept most.

    As `erase`; `references` as for `attribute`.
    """
    attribution = Attribution(**settings)
    images = references or GeneratedImages(seed=attribution.seed)
    given = (attribution, Selection(ratio, per), images)
    kept, scores = [each.prompt for each in _concepts(keep)], _store(store)
    plain = CADAmplify(*given, store=scores)
    method = CADContrastAmplify(*given, preserve=kept, store=scores) if kept else plain
    return method(adapt(pipeline), *_concepts(concept))


def load(path: Path | str) -> WeightEdit:
    """The edit that `WeightEdit.save` wrote. Raises UserError for a missing or damaged file."""
    return WeightEdit.load(path)


def _concepts(given: Concepts) -> list[Concept]:
    several = [given] if isinstance(given, str | Concept) else given
    return [_concept(each) for each in several]


def _concept(given: str | Concept) -> Concept:
    """An object by its name in prompts; styles and the like come as a `Concept` of their own."""
    if isinstance(given, Concept):
        return given
    name = re.sub(r"[^a-z0-9]+", "_", given.lower()).strip("_")
    return Concept(name=name, kind="object", text=given, prompt=given)


def _store(folder: Path | str | None) -> Store | None:
    return None if folder is None else Store(folder)
