"""Every plug-in found in conf/ keeps the contract of its kind.

A new edit, concept, model or evaluator is one module and one YAML; it is found and tested here.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from record_files import read_records
from safetensors.torch import save_file
from weights import write_weights

from cad.concepts import Concept
from cad.edits import Edit
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.models.base import DiffusionModel
from cad.models.hub import Source
from cad.models.pretrained import Pretrained
from cad.models.stable_diffusion import StableDiffusionModel
from cad.weight_edit import NO_EDIT, WeightEdit
from evaluation.evaluators.base import GENERAL, Evaluator, Metric
from evaluation.prompts import Prompt, build_prompts
from experiments.run import configuration
from experiments.run.arguments import build
from experiments.run.configuration import CONF, check
from experiments.run.experiment import prepare
from experiments.run.results import write_records

SMALL = ("debug=tiny", "ratio.value=0.05", "model.attribution.steps=1", "device=cpu")
SMALL_EDITS = {  # what a method needs beside, for a model of one-letter tokens; most need nothing
    "concept_ablation": (
        "edit.base_template='{filler}'",
        "edit.concept_template='{concept} {filler}'",
        "edit.fillers=[day,hut]",
    ),
    "concept_prune": (
        "edit.base_template='{filler}'",
        "edit.concept_template='{concept} {filler}'",
        "edit.fillers=[day,hut]",
    ),
    "contrast": ("edit.preserve=[day]",),
    "contrast_amplify": ("edit.preserve=[day]",),
    "learned_mask": ("edit.preserve=[day]",),
    "other_concept": ("edit.other=day",),
    "rece": ("edit.uce.preserve=[day]",),
    "salun": ("edit.preserve=[day]", "edit.other=hut"),
    "speed": ("edit.preserve=[day,hut]",),
    "uce": ("edit.preserve=[day]",),
}


SMALL_AFTER = ("edit=random", "concept=church", "evaluator=[]", "+evaluator={}")


def options(group: str) -> list[str]:
    return [path.stem for path in sorted((CONF / group).glob("*.yaml")) if path.stem != "default"]


@functools.cache
def compose(*overrides: str) -> DictConfig:
    return configuration.compose(overrides)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


def write_inputs(folder: Path, model: StableDiffusionModel, *concepts: str) -> None:
    """What edits read from files: latents of the concepts, a denoiser that was trained further."""
    latents = {concept: torch.ones(1, *model.latent_shape) for concept in concepts}
    save_file(latents, folder / "references.safetensors")
    trained = {name: weight + 1 for name, weight in list(model.denoiser.named_parameters())[:2]}
    save_file(trained, folder / "unet.safetensors")


def build_edit(name: str, folder: Path) -> Edit:
    """The edit of conf/edit/NAME.yaml in a small configuration, its caches below `folder`."""
    cfg = compose(f"edit={name}", *SMALL, *SMALL_EDITS.get(name, ())).copy()
    cfg.paths.miniature = cfg.paths.results = str(folder)
    if name == "file":
        cfg.edit.path = str(folder / "unet.safetensors")
    edit = build(cfg.edit)
    assert isinstance(edit, Edit)
    assert edit.name == name
    return edit


@pytest.mark.parametrize("name", options("edit"))
def test_edit(name: str, tiny_model: StableDiffusionModel, church: Concept, tmp_path: Path) -> None:
    """Deterministic; leaves model and random state as found; is saved, loaded, applied, undone."""
    write_inputs(tmp_path, tiny_model, "church")
    before, random = parameter_digest(tiny_model.denoiser), torch.get_rng_state()
    made = build_edit(name, tmp_path)(tiny_model, church)
    assert parameter_digest(tiny_model.denoiser) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(weight.requires_grad for weight in tiny_model.denoiser.parameters())
    assert made.provenance["concepts"][0]["name"] == church.name
    assert made.provenance["model"] == tiny_model.provenance()

    made.save(tmp_path / "edit.safetensors")
    loaded = WeightEdit.load(tmp_path / "edit.safetensors")
    assert loaded.fingerprint == made.fingerprint
    with loaded.applied(tiny_model):
        assert (parameter_digest(tiny_model.denoiser) != before) == (made.fingerprint != NO_EDIT)
    assert parameter_digest(tiny_model.denoiser) == before
    assert (made.fingerprint == NO_EDIT) == (name == "none")


@pytest.mark.parametrize("name", options("edit"))
def test_edit_is_deterministic(
    name: str, tiny_model: StableDiffusionModel, church: Concept, tmp_path: Path
) -> None:
    """Two folders, so that no cache answers for the second time."""
    fingerprints = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_inputs(folder, tiny_model, "church")
        fingerprints.add(build_edit(name, folder)(tiny_model, church).fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize("name", options("edit"))
def test_edit_of_several_concepts(
    name: str, tiny_model: StableDiffusionModel, church: Concept, parachute: Concept, tmp_path: Path
) -> None:
    write_inputs(tmp_path, tiny_model, "church", "parachute")
    edit = build_edit(name, tmp_path)
    made = edit(tiny_model, church, parachute)
    assert [concept["name"] for concept in made.provenance["concepts"]] == ["church", "parachute"]
    assert (made.fingerprint == NO_EDIT) == (name == "none")


@pytest.mark.parametrize("name", options("edit"))
def test_an_edit_resolves_for_every_model_and_kind_of_concept(name: str) -> None:
    cfg = configuration.compose([f"edit={name}"])
    for model, concept in itertools.product(options("model"), ("parachute", "pop_art")):
        cfg.model, cfg.concepts = (
            compose(f"model={model}").model,
            compose(f"concept={concept}").concepts,
        )
        assert OmegaConf.to_container(cfg, resolve=True)
        assert "selection" not in cfg.edit or 0 < cfg.ratio.value <= 1


@pytest.mark.parametrize("name", options("after"))
def test_after(
    name: str, tiny_model: StableDiffusionModel, church: Concept, tmp_path: Path
) -> None:
    """What is done to an edited model afterwards is an edit of the unedited one."""
    before = parameter_digest(tiny_model.denoiser)
    paths = [f"paths.results={tmp_path}"]
    plain, method = (
        prepare(compose(*SMALL, *SMALL_AFTER, *paths, "logger=none", *chosen)).method
        for chosen in ((), (f"after={name}",))
    )
    assert method.name == f"random+{name}"
    made = method(tiny_model, church)
    assert made.fingerprint not in (NO_EDIT, plain(tiny_model, church).fingerprint)
    assert parameter_digest(tiny_model.denoiser) == before


@pytest.mark.parametrize("name", options("concept"))
def test_concept(name: str) -> None:
    concept = build(compose(f"concept={name}").concept)
    assert isinstance(concept, Concept)
    assert concept.name == name


@pytest.mark.parametrize("name", options("model"))
def test_model(name: str) -> None:
    cfg = compose(f"model={name}")
    assert cfg.model.name == cfg.model.adapter.name == name
    model = build(cfg.model.adapter)
    assert isinstance(model, Pretrained)
    assert isinstance(model.source, Source)
    assert issubclass(hydra.utils.get_class(model.family), DiffusionModel)
    check(cfg)
    assert 0 <= cfg.model.attribution.eta <= 1
    assert cfg.model.images_per_class >= 1


def judged_prompts(evaluator: Evaluator) -> list[Prompt]:
    """Three prompts of the first of the miniature's sets that the evaluator can judge."""
    prompts = compose().model.prompts
    sets = [prompts.general] if evaluator.measures == GENERAL else [prompts.object, prompts.style]
    for node in sets:
        three = build_prompts(build(node))[:3]
        try:
            evaluator.check(three)
        except UserError:
            continue
        return three
    raise AssertionError(f"{evaluator.name} judges no prompts of the miniature")


OUTSIDE = "outside_accuracy"  # its networks are not here: tests/experiments/test_miniature.py


@pytest.mark.parametrize("name", [name for name in options("evaluator") if name != OUTSIDE])
def test_evaluator(name: str, weights: Path, tmp_path: Path) -> None:
    """Scores image by image, aggregates from the records' file alone, says what measured it."""
    overrides = (f"evaluator=[{name}]", f"paths.miniature={weights}", "device=cpu")
    (node,) = compose(*overrides).evaluator.values()
    evaluator = build(node)
    assert isinstance(evaluator, Evaluator)
    assert json.loads(json.dumps(evaluator.identity()))["version"] == evaluator.version
    prompts = judged_prompts(evaluator)
    images, others = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    references = others if evaluator.paired else None
    origin = {"metric": name, "state": "after"}
    records = [origin | record for record in evaluator.score(images, prompts, references)]
    assert len(records) == len(prompts)
    write_records(tmp_path, records)
    metric = evaluator.aggregate(read_records(tmp_path))
    assert isinstance(metric, Metric)
    assert metric == evaluator.aggregate(records)
    again = [origin | record for record in evaluator.score(images, prompts, references)]
    assert metric == evaluator.aggregate(again)
    assert (metric.name, metric.n) == (name, len(prompts))
    assert metric.low <= metric.value <= metric.high
    assert metric.unit
    assert metric.version
    with pytest.raises(UserError):
        evaluator.aggregate([])
