"""Photographs for edit=amplify are opened and judged before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray
from PIL import Image

from cad.attribution import Attribution
from cad.concepts import Concept
from cad.edits import CADAmplify
from cad.errors import UserError
from cad.references import ImageFolder
from cad.selection import Selection
from evaluation.evaluators.base import Evaluator
from evaluation.prompts import Prompt
from experiments.run import configuration
from experiments.run.experiment import prepare
from experiments.run.photographs import check_photographs

HORN = Concept("french_horn", "object", "French horn", "French horn")


class Bright(Evaluator):
    """Takes bright images for what their group says, and dark ones for coal."""

    name = "bright"
    unit = "%"
    higher_is_better = True
    judges = "correct"
    instrument = "none"

    def score(
        self, images: NDArray[Any], prompts: Sequence[Prompt], references: Any = None
    ) -> list[dict[str, Any]]:
        assert images.shape == (2, 64, 64, 3)
        assert [prompt.group for prompt in prompts] == 2 * ["french_horn"]
        return [{"correct": bool(each.mean() > 100), "predicted": "coal"} for each in images]

    def aggregate(self, records: Any) -> Any:
        raise NotImplementedError


def amplify(folder: Path, **settings: Any) -> CADAmplify:
    attribution = Attribution(steps=1, samples=1)
    return CADAmplify(attribution, Selection(0.1), ImageFolder(folder, count=2, **settings))


def save(folder: Path, **brightness: int) -> None:
    (folder / "french_horn").mkdir(exist_ok=True)
    for name, value in brightness.items():
        picture = Image.new("RGB", (90, 70), (value,) * 3)
        picture.save(folder / "french_horn" / f"{name}.png")


def test_photographs_are_those_that_the_classifier_gets_right(tmp_path: Path) -> None:
    save(tmp_path, a=200, b=200)
    check_photographs(amplify(tmp_path), [HORN], [Bright()], 64)
    save(tmp_path, b=10)
    with pytest.raises(UserError, match=r"b\.png shows no French horn.*=bright, which sees coal"):
        check_photographs(amplify(tmp_path), [HORN], [Bright()], 64)
    check_photographs(amplify(tmp_path, verify=False), [HORN], [Bright()], 64)
    check_photographs(amplify(tmp_path), [HORN], [], 64)
    (tmp_path / "french_horn" / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b\.png cannot be read"):
        check_photographs(amplify(tmp_path, verify=False), [HORN], [], 64)


@pytest.mark.parametrize("model", ["sd14", "sd21"])
def test_missing_photographs_of_the_papers_objects_are_named_at_once(
    tmp_path: Path, model: str
) -> None:
    folder = f"paths.references={tmp_path}"
    chosen = (f"model={model}", "concept=french_horn", "edit=amplify", "device=cpu", folder)
    with pytest.raises(UserError, match=r"needs 5 photographs.*object\.path=DIR.*gets right"):
        prepare(configuration.compose(chosen))
