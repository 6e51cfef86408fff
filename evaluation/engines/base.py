"""What an engine is: it decides which processes, on which machines, make the images of sets.

Whichever does it, sets, keys and bytes are those of `generation.generate` in one process, on alike
machines: engines hand out shards, and end with that call, which verifies all, makes one set of the
shards' work, and makes what a process that failed has left out. All sets of a run are ordered at
once, so that a process builds its model once and waits for others once.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.generation import (
    Batch,
    SamplerSettings,
    Watcher,
    describe_set,
    generate,
    plan_batches,
    set_key,
)
from evaluation.image_sets import ImageSet, Shard
from evaluation.prompts import Prompt

BuildModel = Callable[[str], DiffusionModel]
"""Makes a run's model on the device given, in any process: it can be pickled and hashed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A shard of an ordered set that has images missing; what another process is given to make."""

    key: str  # of the set, as the process that ordered it has it
    shard: tuple[int, int]  # its number, from 0, and how many there are
    missing: int  # images


@dataclass(frozen=True)
class Order:
    """An image set that is wanted: the arguments of `generate` that are not the model.

    `watch` is shown what this process makes of it.
    """

    edit: WeightEdit
    prompts: tuple[Prompt, ...]
    settings: SamplerSettings
    root: Path
    watch: Watcher | None = None

    def generate(self, model: DiffusionModel, shard: tuple[int, int] | None = None) -> ImageSet:
        return generate(model, self.edit, self.prompts, self.settings, self.root, shard, self.watch)

    def locate(self, model: DiffusionModel) -> ImageSet:
        """Its set, of which any image may be missing. Makes no folder."""
        description = describe_set(model, self.edit, self.prompts, self.settings)
        return ImageSet(self.root / set_key(description), self.prompts)

    def batches(self, model: DiffusionModel) -> list[Batch]:
        return plan_batches(model, self.prompts, self.settings)

    def pieces(self, model: DiffusionModel, count: int) -> list[Piece]:
        """Those of `count` shards with images missing, by the files' names: cheap, and no proof."""
        images, batches = self.locate(model), self.batches(model)
        absent = images.absent()
        pieces = []
        for index in range(count):
            own = Shard(index, count).take(batches)
            missing = sum(image in absent for batch in own for image in batch.indices)
            if missing:
                pieces.append(Piece(images.folder.name, (index, count), missing))
        return pieces

    def sent(self) -> Order:
        """The same for another process: it can be pickled, and its root means the same there."""
        return replace(self, watch=None, root=self.root.absolute())

    def make_piece(self, model: DiffusionModel, piece: Piece) -> None:
        """Raises UserError where the model would make another set than was ordered."""
        key = self.locate(model).folder.name
        if key != piece.key:
            raise UserError(
                f"this process would make images of the set {key}, ordered were those of "
                f"{piece.key}: weights, kind of device or library versions differ. Every machine "
                "needs the same installation and the same weights"
            )
        self.generate(model, piece.shard)


class Engine(ABC):
    """Makes image sets."""

    @abstractmethod
    def make(
        self, model: DiffusionModel, build: BuildModel, orders: Sequence[Order]
    ) -> list[ImageSet]:
        """The complete sets of `orders`, as `generate` makes them.

        `model` is this process's, `build` makes the same in others. Raises UserError as `generate`
        does, and where the engine cannot work; never returns a set with images missing.
        """


def finish(model: DiffusionModel, orders: Sequence[Order]) -> list[ImageSet]:
    """The sets after the other processes' work; what these left out is made here, and said so."""
    for order in orders:
        images = order.locate(model)
        missing = images.missing()
        if missing:
            logger.warning(
                "%s: %d images are missing after all processes ended; making them in this one",
                images.folder,
                missing,
            )
    return [order.generate(model) for order in orders]
