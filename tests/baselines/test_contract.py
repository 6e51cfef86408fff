"""Every method names bad values, tells its settings apart, and leaves the model as found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from baselines.concept_ablation import ConceptAblation
from baselines.concept_prune import ConceptPrune
from baselines.esd import ESD
from baselines.rece import RECE, StartingUCE
from baselines.salun import SalUn
from baselines.speed import SPEED
from baselines.uce import UCE
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.references import GeneratedImages

NAN, INF = float("nan"), float("inf")
START = StartingUCE(" ", ["tench"])
PAIRS = {"base_template": "a {filler}", "concept_template": "{concept} {filler}"}
PAIRS |= {"fillers": ["day", "hut"]}
FIRST = {"steps": 10, "first_steps": 2, "guidance": 3.0}
PICTURES = {"pictures": GeneratedImages(1, 2, encoding=None)}
TRAINED = {"parameters": "xattn", "iterations": 2, "lr": 1e-3, "steps": 3}
SALUN = {"other": "tench", "preserve": ["golf ball"]}
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "concept_prune": (ConceptPrune, PAIRS | FIRST | {"ratio": 0.05, "majority": 0.5}),
    "concept_ablation": (ConceptAblation, TRAINED | PAIRS | PICTURES),
    "esd": (ESD, TRAINED),
    "rece": (RECE, {"uce": START, "epochs": 1, "regularisation": 0.1}),
    "salun": (SalUn, TRAINED | SALUN | PICTURES),
    "speed": (SPEED, {"guide": " ", "preserve": ["tench", "golf ball"]}),
    "uce": (UCE, {"guide": " ", "preserve": ["tench"]}),
}
OTHERS = [  # settings that make another edit
    ("concept_prune", {"seed": 1}, {"steps": 11}, {"fillers": ["day"]}, {"majority": 0.25}),
    ("concept_prune", {"record": "prompted"}, {"noise": "own"}, {"kind": "ddim"}),
    ("esd", {"seed": 1}, {"lr": 1.0}, {"steps": 4}, {"accumulation": 2}, {"trained_on": "prompt"}),
    ("rece", {"uce": StartingUCE(" ", [])}, {"epochs": 2}, {"regularisation": 1e-3}),
    ("rece", {"update_regularisation": 0.5}, {"preserve_scale": 1}, {"guide": "art"}),
    ("rece", {"skip_if_erased": True}, {"erased_threshold": 0.7}),
    ("concept_ablation", {"prior_scale": 1}, {"fillers": ["day"]}, {"seed": 1}, {"lr": 1.0}),
    ("concept_ablation", {"pictures": GeneratedImages(2, 2, encoding=None)}),
    ("salun", {"other": "hut"}, {"preserve": ["hut"]}, {"share": 1}, {"retain_scale": 0}),
    ("salun", {"guidance": 3}, {"pictures": GeneratedImages(2, 2, encoding=None)}, {"seed": 1}),
    ("speed", {"guide": "art"}, {"preserve": ["tench"]}, {"weights": "key"}, {"threshold": 0.2}),
    ("speed", {"regularisation": 2}, {"filtered": False}, {"augmentations": 0}, {"seed": 1}),
    ("speed", {"positions": "from_last"}),
    ("uce", {"guide": "art"}, {"preserve": []}, {"erase_scale": 2}, {"regularisation": 0.1}),
    ("uce", {"positions": "last"}, {"templates": ["image of {concept}"]}),
    ("uce", {"expand_guide": True}),
]
SAME = [  # settings that make the same edit
    ("concept_ablation", {"prior_scale": 0}),
    ("salun", {"guidance": 7.5}, {"checkpoints": "/nowhere"}),
    ("concept_prune", {"guidance": 3}),
    ("esd", {"checkpoint_every": 1}, {"checkpoints": "/nowhere"}, {"guidance": 3}),
    ("rece", {"preserve_scale": 0.1}),
    ("speed", {"regularisation": 1}),
    ("uce", {"erase_scale": 1}),
]
BAD: list[tuple[str, str, list[Any]]] = [
    ("concept_prune", "base_template", ["a photo", "a {concept} {filler}", None]),
    ("concept_prune", "concept_template", ["a {filler}", "a {concept} {scene}", "a {concept {x}"]),
    ("concept_prune", "fillers", [[], "forest", ["forest", " "]]),
    ("concept_prune", "ratio", [0, 1.1, NAN, None]),
    ("concept_prune", "majority", [1.0, -0.1]),
    ("concept_prune", "guidance", [INF]),
    ("concept_prune", "first_steps", [0, 11]),
    ("concept_prune", "steps", [2.5, 1001]),
    ("concept_prune", "batch_size", [0, True]),
    ("concept_prune", "seed", [-1]),
    ("concept_prune", "record", ["base"]),
    ("concept_prune", "noise", [None]),
    ("esd", "parameters", ["lora"]),
    ("esd", "trained_on", ["base_prompt"]),
    ("esd", "iterations", [0, 1.5]),
    ("esd", "steps", [0, 1001]),
    ("esd", "batch_size", [0]),
    ("esd", "accumulation", [0]),
    ("esd", "checkpoint_every", [0]),
    ("esd", "seed", [-1, None]),
    ("esd", "lr", [0.0, "1e-5", NAN]),
    ("esd", "guidance", [INF]),
    ("esd", "negative_guidance", [None]),
    ("rece", "uce", [None]),
    ("rece", "epochs", [-1, 1.5, None]),
    ("rece", "regularisation", [0, None]),
    ("rece", "update_regularisation", [-0.1]),
    ("rece", "preserve_scale", [-1]),
    ("rece", "guide", [None]),
    ("rece", "skip_if_erased", ["yes"]),
    ("rece", "erased_threshold", [0]),
    ("concept_ablation", "base_template", ["a photo"]),
    ("concept_ablation", "prior_scale", [-1]),
    ("concept_ablation", "iterations", [0]),
    ("salun", "parameters", ["lora"]),
    ("salun", "preserve", ["day"]),
    ("salun", "share", [0, 2]),
    ("salun", "retain_scale", [-1]),
    ("speed", "weights", ["query"]),
    ("speed", "threshold", [0]),
    ("speed", "augmentations", [-1]),
    ("speed", "filtered", [None]),
    ("uce", "guide", [None]),
    ("uce", "preserve", ["tench", [1]]),
    ("uce", "erase_scale", [0, NAN]),
    ("uce", "preserve_scale", [-1, "none"]),
    ("uce", "regularisation", [0, INF, True]),
    ("uce", "positions", ["all"]),
    ("uce", "templates", [[], ["image of"]]),
    ("uce", "expand_guide", [1]),
]


def build(name, **changes):
    method, settings = METHODS[name]
    return method(**settings | changes)


@pytest.mark.parametrize(("name", "key", "values"), BAD)
def test_bad_values_are_named(name, key, values):
    for value in values:
        with pytest.raises(UserError, match=rf"edit\.{key}(\[0\])?="):
            build(name, **{key: value})


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_json_and_tell_edits_apart(name, church):
    def written(table):
        rows = [changes for method, *row in table if method == name for changes in row]
        settings = [build(name, **changes).settings([church]) for changes in rows]
        return [json.dumps(each, sort_keys=True) for each in settings]

    plain, others = written([(name, {})]), written(OTHERS)
    assert len({*plain, *others}) == 1 + len(others)
    assert {*written(SAME)} == {*plain}


@pytest.mark.parametrize("name", METHODS)
def test_deterministic_and_the_model_is_left_as_found_also_after_an_error(name, tiny_model, church):
    def look():
        parts = (tiny_model.denoiser, tiny_model.text_encoder)
        modules = [module for part in parts for module in part.modules()]
        return (
            [parameter_digest(part) for part in parts],
            torch.get_rng_state().tolist(),
            any(weight.requires_grad for part in parts for weight in part.parameters()),
            any(module.training for module in modules),
            sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules),
        )

    before, method = look(), build(name)
    made = method(tiny_model, church)
    assert method(tiny_model, church).fingerprint == made.fingerprint
    assert look() == before
    assert made.cost.seconds > 0
    long = replace(church, text="a" * 99, prompt="a" * 99)
    with pytest.raises(UserError, match=rf"edit={name}: the prompt '(a )?a+"):
        method(tiny_model, long)
    assert look() == before


@pytest.mark.parametrize("name", ["concept_ablation", "esd", "rece", "salun", "speed", "uce"])
def test_a_model_without_cross_attention_is_refused(name, tiny_model, church):
    tiny_model.text_projections = None
    with pytest.raises(UserError, match=rf"edit={name}: model=tiny .* no cross-attention"):
        build(name)(tiny_model, church)


@pytest.mark.parametrize("name", ["concept_prune", "rece", "speed", "uce"])
def test_half_precision_makes_edits_of_its_dtype(name, tiny_model, church):
    exact = build(name)(tiny_model, church)
    for part in (tiny_model.denoiser, tiny_model.text_encoder):
        part.to(torch.bfloat16)
    del tiny_model.digests
    made = build(name)(tiny_model, church)
    assert made.num_weights > 0
    for key, change in made.changes.items():
        if change.kind == "replace":
            assert change.tensor.dtype == torch.bfloat16
            difference = (change.tensor.float() - exact.changes[key].tensor).norm()
            assert difference < 0.1 * exact.changes[key].tensor.norm()
