"""Do the photographs that `edit=amplify` starts from show what their folder's name says?

The paper took images of ImageNet that its classifier gets right.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from cad.concepts import Concept
from cad.edits import CADAmplify
from cad.errors import UserError
from cad.references import ImageFolder
from evaluation.evaluators.base import Evaluator
from evaluation.prompts import Prompt


def check_photographs(
    method: CADAmplify,
    concepts: Sequence[Concept],
    evaluators: Sequence[Evaluator],
    resolution: int,
) -> None:
    """Raise UserError for pictures that are missing, damaged, or judged to show something else.

    Those of the evaluators judge that can; without one the pictures are opened and no more. Weights
    are loaded into copies, which are let go. `resolution` is the model's, in pixels.
    """
    if not isinstance(method.references, ImageFolder):
        return
    judges = [copy.deepcopy(each) for each in evaluators if each.judges is not None]
    for concept in concepts:
        pictures = method.references.pictures(concept, resolution)
        if not method.references.verify:
            continue
        images = (torch.stack(list(pictures.values())) * 255).round().byte()  # (R, 3, H, W)
        prompts = [Prompt(concept.text, 0, concept.name)] * len(images)
        for judge in judges:
            records = judge.score(images.permute(0, 2, 3, 1).numpy(), prompts)
            for path, record in zip(pictures, records, strict=True):
                if not record[str(judge.judges)]:
                    seen = record.get("predicted", "nothing of it")
                    raise UserError(
                        f"{path} shows no {concept.text} to evaluator={judge.name}, which sees "
                        f"{seen}: take another photograph, as the paper did, or this one all the "
                        "same with model.references.object.verify=false"
                    )
