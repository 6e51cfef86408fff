"""What conf/ sets for the paper's models is what its tables were made with, as far as is known."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.run import configuration
from experiments.run.arguments import build
from experiments.run.configuration import CONF

PAPER = CONF.parent / "results" / "paper"
OBJECTS = OmegaConf.load(CONF / "table" / "table01.yaml").axes.concept


@functools.cache
def composed(*overrides: str) -> DictConfig:
    return configuration.compose(overrides)


def settings(edit: str, concept: str, model: str = "sd14") -> Any:
    """The settings of an edit for a concept of a model of the paper."""
    cfg = composed(f"edit={edit}", f"model={model}").copy()
    OmegaConf.set_struct(cfg, False)
    cfg.concepts = {concept: OmegaConf.load(CONF / "concept" / f"{concept}.yaml")}
    return OmegaConf.create(configuration.plain(cfg.edit))


@pytest.mark.parametrize("concept", ["nudity", "church", "van_gogh"])
def test_esd(concept: str) -> None:
    """A thousand steps on the word itself."""
    edit = settings("esd", concept)
    word = {"nudity": "nudity", "church": "church", "van_gogh": "Van Gogh"}[concept]
    cfg = OmegaConf.load(CONF / "concept" / f"{concept}.yaml")
    assert build(edit).texts([build(cfg)]) == [word]
    assert edit.parameters == ("xattn" if concept == "van_gogh" else "noxattn")
    assert (edit.iterations, edit.lr, edit.negative_guidance) == (1000, 1e-5, 1)
    assert (edit.guidance, edit.steps, edit.batch_size, edit.accumulation) == (3, 50, 1, 1)


@pytest.mark.parametrize("concept", ["nudity", "church", "van_gogh"])
def test_uce(concept: str) -> None:
    edit = settings("uce", concept)
    assert (edit.regularisation, edit.erase_scale, edit.preserve_scale) == (0.5, 1, None)
    assert (edit.positions, edit.templates, edit.expand_guide) == (
        "from_last",
        ["{concept}"],
        False,
    )
    assert edit.guide == ("art" if concept == "van_gogh" else " ")
    assert len(edit.preserve) == (6 if concept == "van_gogh" else 1)


@pytest.mark.parametrize(("model", "table"), [("sd14", "table01"), ("sd21", "table08")])
def test_rece_is_uce_where_their_columns_are_the_same(model: str, table: str) -> None:
    """Starting from the very UCE of edit=uce; without rounds where the two columns coincide."""
    values = pd.read_csv(PAPER / f"{table}.csv", dtype=str)
    cells = values.pivot(index=["row", "metric"], columns="column", values="value")
    same = (cells["uce"] == cells["rece"]).groupby("row").all()
    assert set(same.index) == set(OBJECTS)
    for concept in [*OBJECTS, "nudity", "van_gogh"]:
        rece, uce = settings("rece", concept, model), settings("uce", concept, model)
        assert {**rece.uce, "_target_": uce._target_} == uce
        assert (rece.update_regularisation, rece.preserve_scale, rece.guide) == (0.1, 0.1, " ")
        assert (rece.epochs == 0) == same.get(concept, False)
        if rece.epochs:
            small = concept in ("church", "van_gogh", "garbage_truck") and not (
                model == "sd21" and concept == "garbage_truck"
            )
            assert rece.regularisation == (1e-3 if small else 1e-1)


@pytest.mark.parametrize("concept", ["nudity", "church", "van_gogh"])
def test_concept_prune(concept: str) -> None:
    edit = settings("concept_prune", concept)
    ratio, first_steps = (0.01, 9) if concept == "nudity" else (0.02, 10)
    assert (edit.ratio, edit.first_steps, edit.majority) == (ratio, first_steps, 0.5)
    assert (edit.record, edit.noise, edit.kind) == ("both", "shared", "default")
    assert (edit.steps, edit.guidance) == (50, 7.5)


def test_amplify() -> None:
    """Fifty generated references, or five photographs, stretched; latents are sampled."""
    explicit, photographs = (settings("amplify", each) for each in ("nudity", "church"))
    made, read = explicit.references, photographs.references
    assert made._target_.endswith("GeneratedImages")
    assert (made.count, made.batch_size, made.steps, made.guidance) == (50, 5, 50, 7.5)
    assert (read._target_, read.count, read.fit) == ("cad.references.ImageFolder", 5, "stretch")
    assert made.encoding == read.encoding == "sample"
    assert (explicit.attribution.samples, photographs.attribution.samples) == (1, 4)
