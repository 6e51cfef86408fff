"""Prompts to conditionings, batch by batch: each distinct prompt is encoded once, by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch

from cad.errors import UserError
from cad.models.base import Conditioning, DiffusionModel

MAIN_MEMORY = torch.device("cpu")

logger = logging.getLogger(__name__)


class PromptEncoder:
    """Iterates over batches of prompts as conditionings; encodes each distinct prompt once.

    A prompt is encoded by itself, so its embedding does not depend on what stands beside it. Those
    that later batches need wait in main memory, and none is kept longer. Prompts are cut to what
    the encoder takes: `check_prompts` has refused those that may not be.
    """

    def __init__(self, model: DiffusionModel, batches: Sequence[Sequence[str]]) -> None:
        self._model = model
        self._batches = batches
        self._last_use = {text: i for i, batch in enumerate(batches) for text in batch}
        self.unconditional = model.encode_prompts([""])

    def __iter__(self) -> Iterator[Conditioning]:
        known: dict[str, Conditioning] = {}
        for i, batch in enumerate(self._batches):
            with self._model.encoding():
                for text in dict.fromkeys(batch):
                    if text not in known:
                        encoded = self._model.encode_prompts([text], truncate=True)
                        known[text] = _moved(encoded, MAIN_MEMORY)
            yield _moved(Conditioning.cat([known[text] for text in batch]), self._model.device)
            known = {text: kept for text, kept in known.items() if self._last_use[text] > i}


def report_cut(model: DiffusionModel, texts: Sequence[str]) -> None:
    """Say how many of the texts, all of which may be cut if they are too long, are."""
    try:
        model.check_prompts(texts)
    except UserError:
        cut = sum(_is_too_long(model, text) for text in texts)
        logger.info(
            "%d of %d distinct prompts are longer than the text encoder of model=%s takes and are "
            "cut (prompts.rules.truncate)",
            cut,
            len(texts),
            model.name,
        )


def _is_too_long(model: DiffusionModel, text: str) -> bool:
    try:
        model.check_prompts([text])
    except UserError:
        return True
    return False


def _moved(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return Conditioning({name: t.to(device) for name, t in conditioning.tensors.items()})
