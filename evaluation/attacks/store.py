"""Attacks on many prompts, in batches that are kept on disk: a killed run goes on with the next.

A batch's file (`cad.store`) has the adversarial images as tensor and the rest in its header. It is
addressed by all that determines what is found: model, edit, attack, sampler, judge, device and
libraries, and the prompts with their seeds and the images that are looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cad.identity import describe_runtime
from cad.models.base import DiffusionModel
from cad.store import Notes, Store, read_tensors, write_tensors
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import VERSION, Attack, Outcome, attempt
from evaluation.attacks.judge import EvaluatorJudge
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import Batch, SamplerSettings, plan_batches

FORMAT = "cad-attack/1"


class AttackStore(Store):
    """A folder of finished batches."""

    def attack(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        attack: Attack,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        judge: EvaluatorJudge,
        images: Sequence[Pixels] = (),
    ) -> list[Outcome]:
        """The outcome of each prompt, in their order; batches that are in the folder are read.

        `images` are the unedited model's that the attack looks at, one for each prompt, if it does.
        Leaves the model and the global random state as found. Raises UserError as `attempt`, and
        for a folder that cannot be written to or locked.
        """
        batched = replace(settings, batch_size=attack.batch_size)
        shared = {
            "attempt": VERSION,
            "model": model.provenance(),
            "edit": edit.fingerprint,
            **attack.settings(),
            "judge": judge.version,
            **describe_runtime(model.device),
        }
        outcomes: dict[int, Outcome] = {}
        steps, looks = attack.tries, attack.uses_images
        with tqdm(desc=attack.name, total=len(prompts) * steps, unit="step", disable=None) as bar:
            for batch in plan_batches(model, prompts, batched):
                own = replace(batched, guidance=batch.guidance)
                seen = np.stack([images[i] for i in batch.indices]) if looks else None
                make = partial(attempt, model, edit, attack, batch.prompts, own, judge, bar, seen)
                what, key = f"the {attack.name} attack", shared | _own(batch, own, seen)
                found, _ = self.get_or_make(key, what, _read, make, _write)
                outcomes |= dict(zip(batch.indices, found, strict=True))
                bar.update(len(outcomes) * steps - bar.n)  # by what was read
                broken = sum(outcome.success for outcome in outcomes.values())
                bar.set_postfix_str(f"{broken} of {len(outcomes)} prompts succeed")
        return [outcomes[index] for index in range(len(prompts))]


def _own(batch: Batch, settings: SamplerSettings, images: Pixels | None) -> dict[str, Any]:
    """The part of the key that is a batch's own; `settings` have its guidance."""
    sampler = settings.settings()
    del sampler["batch_size"]
    return {
        "sampler": sampler,
        "prompts": [[p.text, p.seed, p.group, p.size, p.truncate] for p in batch.prompts],
        "images": images if images is None else hashlib.sha256(images.tobytes()).hexdigest(),
    }


def record_of(outcome: Outcome) -> dict[str, Any]:
    """All but the image, JSON-able."""
    return {f.name: getattr(outcome, f.name) for f in fields(outcome) if f.name != "image"}


def _write(path: Path, outcomes: Sequence[Outcome]) -> Notes:
    images = torch.from_numpy(np.stack([outcome.image for outcome in outcomes]))  # (N, H, W, 3)
    write_tensors(path, {"images": images}, {"outcomes": [*map(record_of, outcomes)]}, FORMAT)
    return {}


def _read(path: Path, _notes: Notes) -> list[Outcome]:
    header, tensors = read_tensors(path, FORMAT)
    pairs = zip(header["outcomes"], tensors["images"].numpy(), strict=True)
    return [Outcome(**told, image=image) for told, image in pairs]
