"""Attacks in batches on disk: found once, resumed where they stopped, addressed by what counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cad.weight_edit import WeightEdit
from evaluation.attacks import store
from evaluation.attacks.base import Outcome
from evaluation.attacks.judge import EvaluatorJudge
from evaluation.attacks.p4d import P4D
from evaluation.attacks.store import AttackStore
from evaluation.attacks.unlearn_diff import UnlearnDiff
from evaluation.evaluators.base import Evaluator
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings

SETTINGS = SamplerSettings(steps=2, guidance=3.0, kind="default", batch_size=64)
SMALL = {"tokens": 2, "timesteps": 3, "iterations": 2, "lr": 0.1, "weight_decay": 0.1}
SMALL |= {"optimizer": "adam", "retokenize": True, "batch_size": 2}
P4D_SMALL = SMALL | {"states": "image"}
PROMPTS = [Prompt("a hut", seed, "hut", guidance=7.0 if seed == 1 else None) for seed in range(4)]
NO_EDIT = WeightEdit({}, {})


class Judging(Evaluator):
    name, unit, higher_is_better, judges = "judging", "%", True, "seen"
    instrument = "eye"

    def settings(self):
        return {}

    def score(self, images, prompts, references=None):
        return [{"seen": 0} for _ in prompts]


@pytest.fixture
def searched(monkeypatch):
    """The seeds of each batch that is searched, in place of searching."""
    batches: list[list[int]] = []

    def attempt(model, edit, attack, prompts, settings, judge, progress, images):
        batches.append([prompt.seed for prompt in prompts])
        return [outcome(prompt.seed) for prompt in prompts]

    monkeypatch.setattr(store, "attempt", attempt)
    return batches


def outcome(seed):
    image = np.full((4, 4, 3), seed, np.uint8)
    return Outcome(seed == 2, 1, 999, [5, seed], f"x{seed} a hut", True, [0.5, None], image)


def attack(folder, model, attack=None, prompts=PROMPTS, settings=SETTINGS, grey=0):
    judge = EvaluatorJudge(Judging())
    attack = attack or P4D(**P4D_SMALL)
    images = [np.full((4, 4, 3), grey, np.uint8)] * len(prompts)
    return AttackStore(folder).attack(model, NO_EDIT, attack, prompts, settings, judge, images)


def files(folder):
    return len(list(folder.glob("*.safetensors")))


def test_batches_of_one_guidance_are_found_once_also_by_a_run_that_was_killed(
    tiny_model, tmp_path, searched, monkeypatch
):
    whole = store.attempt

    def killed(model, edit, attack, prompts, *rest):
        if prompts[0].seed == 1:
            raise KeyboardInterrupt
        return whole(model, edit, attack, prompts, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(store, "attempt", killed)
        with pytest.raises(KeyboardInterrupt):
            attack(tmp_path, tiny_model)
    assert files(tmp_path) == 1
    first, again = attack(tmp_path, tiny_model), attack(tmp_path, tiny_model)
    assert searched == [[0, 2], [1], [3]]
    for seed, (one, other) in enumerate(zip(first, again, strict=True)):
        assert one.text == other.text == f"x{seed} a hut"
        assert (one.success, one.tokens, one.losses) == (seed == 2, [5, seed], [0.5, None])
        assert np.array_equal(one.image, other.image)


@pytest.mark.parametrize("damage", ["truncated", "image", "verdict"])
def test_a_damaged_or_altered_file_is_made_again(tiny_model, tmp_path, searched, caplog, damage):
    (first,) = attack(tmp_path, tiny_model, prompts=PROMPTS[:1])
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    altered = {
        "truncated": whole[:100],
        "image": whole[:-1] + bytes([whole[-1] ^ 1]),
        "verdict": whole.replace(rb"success\": false", rb"success\": true "),
    }
    assert altered[damage] != whole
    path.write_bytes(altered[damage])
    (again,) = attack(tmp_path, tiny_model, prompts=PROMPTS[:1])
    assert searched == [[0], [0]]
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole
    assert (again.success, again.image.tolist()) == (first.success, first.image.tolist())


def test_a_file_is_addressed_by_all_that_counts(tiny_model, tmp_path, searched, monkeypatch):
    attack(tmp_path, tiny_model, prompts=PROMPTS[:1])
    checkpointed = P4D(**P4D_SMALL, gradient_checkpointing=True)  # memory alone
    attack(tmp_path, tiny_model, checkpointed, PROMPTS[:1])
    assert files(tmp_path) == 1
    changes = ("lr", 0.2), ("batch_size", 3), ("optimizer", "adamw"), ("states", "trajectory")
    others = [P4D(**P4D_SMALL | {key: value}) for key, value in (*changes, ("retokenize", False))]
    for number, other in enumerate((*others, UnlearnDiff(**SMALL)), start=2):
        attack(tmp_path, tiny_model, other, PROMPTS[:1])
        assert files(tmp_path) == number
    attack(tmp_path, tiny_model, prompts=[Prompt("a hut", 0, "den")])  # judged otherwise
    attack(tmp_path, tiny_model, prompts=PROMPTS[:1], settings=replace(SETTINGS, steps=3))
    attack(tmp_path, tiny_model, prompts=PROMPTS[:1], grey=1)
    assert files(tmp_path) == 10
    for count, (name, changed) in enumerate({"version": 2, "instrument": "lens"}.items(), start=11):
        monkeypatch.setattr(Judging, name, changed)
        attack(tmp_path, tiny_model, prompts=PROMPTS[:1])
        assert files(tmp_path) == count
    versions = (store, "VERSION"), (P4D, "version")
    for total, (place, name) in enumerate(versions, start=13):
        monkeypatch.setattr(place, name, 99)
        attack(tmp_path, tiny_model, prompts=PROMPTS[:1])
        assert files(tmp_path) == total
