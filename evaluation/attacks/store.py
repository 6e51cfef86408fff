"""Attacks on many prompts, in batches that are kept on disk: a killed run goes on with the next.

A batch's file is addressed by the hash of all that determines what is found: model, edit, attack,
sampler, judge, device and libraries, and the prompts with their seeds. It is a safetensors file of
the adversarial images with one metadata entry, JSON, of everything else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from cad.digests import settings_digest
from cad.files import atomic_path
from cad.models.base import DiffusionModel
from cad.runtime import describe_runtime
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import Attack
from evaluation.attacks.judge import EvaluatorJudge
from evaluation.attacks.search import VERSION, Outcome, search
from evaluation.generation import SamplerSettings, plan_batches
from evaluation.prompts import Prompt

IMAGES = "images"
HEADER = "attack"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttackStore:
    """A folder of finished batches. Writes atomically; a damaged file is made again, and told."""

    root: Path

    def attack(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        attack: Attack,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        judge: EvaluatorJudge,
    ) -> list[Outcome]:
        """The outcome of each prompt, in their order; batches that are in the folder are read.

        Leaves the model and the global random state as found. Raises UserError as `search`.
        """
        batched = replace(settings, batch_size=attack.schedule.batch_size)
        batches = plan_batches(model, prompts, batched)
        outcomes: dict[int, Outcome] = {}
        steps = attack.schedule.timesteps
        progress: tqdm[Any] = tqdm(
            total=len(prompts) * steps, unit="timestep", desc=attack.name, disable=None
        )
        with progress:
            for batch in batches:
                chosen = [prompts[index] for index in batch.indices]
                own = replace(batched, guidance=batch.guidance)
                path = self.path(model, edit, attack, chosen, own, judge)
                found = _read(path)
                if found is None:
                    found = search(model, edit, attack, chosen, own, judge, progress)
                    _write(path, found)
                else:
                    progress.update(len(found) * steps)
                outcomes |= dict(zip(batch.indices, found, strict=True))
                broken = sum(outcome.success for outcome in outcomes.values())
                progress.set_postfix_str(f"{broken} of {len(outcomes)} prompts succeed")
        return [outcomes[index] for index in range(len(prompts))]

    def path(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        attack: Attack,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        judge: EvaluatorJudge,
    ) -> Path:
        """Where a batch's outcomes belong, whether or not they are there."""
        sampler = {"steps": settings.steps, "kind": settings.kind}
        key = {
            "version": VERSION,
            "model": model.provenance(),
            "edit": edit.fingerprint,
            **attack.settings(),
            "sampler": sampler | {"guidance": float(settings.guidance)},  # 4 is 4.0
            "judge": judge.version,
            "prompts": [_describe(prompt) for prompt in prompts],
            **describe_runtime(model.device),
        }
        return self.root / f"{settings_digest(key)}.safetensors"


def _describe(prompt: Prompt) -> list[Any]:
    """What of a prompt an outcome depends on; its guidance is the batch's."""
    return [prompt.text, prompt.seed, prompt.group, prompt.size, prompt.truncate]


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    images = np.stack([outcome.image for outcome in outcomes])  # (N, H, W, 3)
    told = [record_of(outcome) for outcome in outcomes]
    with atomic_path(path) as temporary:
        save_file({IMAGES: images}, temporary, {HEADER: json.dumps(told)})


def record_of(outcome: Outcome) -> dict[str, Any]:
    """All but the image, JSON-able."""
    return {f.name: getattr(outcome, f.name) for f in fields(outcome) if f.name != "image"}


def _read(path: Path) -> list[Outcome] | None:
    """A batch's outcomes; None where there are none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            told = json.loads(file.metadata()[HEADER])
            images = file.get_tensor(IMAGES)  # (N, H, W, 3)
        return [Outcome(**each, image=image) for each, image in zip(told, images, strict=True)]
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        logger.warning("the attacks in %s are damaged (%s): making them again", path, error)
        return None
