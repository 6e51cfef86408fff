"""What is done to an edited model afterwards: attacks on its weights, defences, more training.

The result is an edit of the unedited model again, so it is stored, applied and measured like every
other: whether the concept came back is what the ordinary evaluators say.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cad.concepts import Concept
from cad.edits import Edit, make_edit
from cad.identity import material
from cad.instrument import measure
from cad.models.base import DiffusionModel
from cad.store import Store
from cad.weight_edit import WeightEdit


@dataclass(frozen=True, eq=False)
class Afterwards(Edit):
    """The edit of `inner`, another method, and what `alter` makes of it; several can be chained."""

    step: ClassVar[str]  # as in conf/after/STEP.yaml

    inner: Edit
    _: KW_ONLY
    store: Store | None = None  # of edits, for the inner one

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.inner.name}+{self.step}")

    @property
    def innermost(self) -> Edit:
        return self.inner.innermost

    def settings(self, concepts: Sequence[Concept]) -> Mapping[str, Any]:
        inner = self.inner.identity(concepts)
        del inner["concepts"]
        found = material(self) | {"inner": inner}
        del found["store"]
        return found

    def make(self, model: DiffusionModel, concepts: Sequence[Concept]) -> WeightEdit:
        """The altered edit; its cost is that of both."""
        edit, _ = make_edit(self.inner, model, concepts, self.store)
        with measure(model.device) as meter:
            made = self.alter(model, concepts, edit)
        return replace(made, cost=edit.cost + meter.cost)

    @abstractmethod
    def alter(
        self, model: DiffusionModel, concepts: Sequence[Concept], edit: WeightEdit
    ) -> WeightEdit:
        """The edit that takes the place of `edit`. Leaves the model, which is unedited, as found.

        Raises UserError for an edit that it can do nothing with.
        """


@torch.no_grad()
def edited_weights(model: DiffusionModel, edit: WeightEdit) -> dict[str, Tensor]:
    """Copies of the weights that the edit changes, as it leaves them, by name."""
    weights = dict(model.denoiser.named_parameters())
    with edit.applied(model):
        return {name: weights[name].detach().clone() for name in edit.changes}
