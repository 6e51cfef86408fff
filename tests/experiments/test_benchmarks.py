"""The benchmarks' cases are commands that run.py takes; agreement is what it says it is."""

from __future__ import annotations

import hydra
import pytest
import torch
from omegaconf import DictConfig

from cad.attribution import Attribution
from cad.edits import CADAmplify, CADErase
from cad.errors import UserError
from cad.references import LatentFile
from cad.selection import Selection
from experiments.benchmarks import editing
from experiments.benchmarks.agreement import agree
from experiments.config import REPOSITORY, register_resolvers

TABLE_10 = ("esd", "concept_prune", "rece", "uce", "erase shared", "erase restart")


def benchmark(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return hydra.compose("benchmark_editing", list(overrides))


@pytest.mark.parametrize("weights", ["random", "random-small"])
def test_every_case_is_a_command_of_run(weights: str) -> None:
    config = benchmark(f"weights={weights}")
    cases = editing.chosen_cases(config)
    for method in TABLE_10:
        assert any(case["name"].startswith(f"sd14 {method}") for case in cases)
    assert {case["model"] for case in cases} == {"sd14", "sd21", "sdxl", "sd35"}
    for case in cases:
        cfg = editing.compose(config, case["model"], case["overrides"])
        assert cfg.model.weights == weights
        assert not cfg.evaluator


def test_what_matches_no_case_is_refused() -> None:
    with pytest.raises(UserError, match=r"only=sd15\* matches none of the cases: sd14 erase"):
        editing.chosen_cases(benchmark("only='sd15*'"))


def test_a_case_is_measured() -> None:
    config = benchmark("weights=random-small", "only='sd14 uce'", "device=cpu")
    (row,) = editing.run_cases(config, "sd14", editing.chosen_cases(config))
    assert row["weights"] > 0
    assert row["whole"] == row["seconds"] > 0
    assert list(editing.as_table([row])["case"]) == ["sd14 uce"]


def test_a_case_that_fails_leaves_its_reason() -> None:
    config = benchmark("weights=random-small", "device=cpu")
    case = {"name": "too long", "times": 1, "overrides": ["edit=uce", "edit.guide=" + 80 * "x"]}
    (row,) = editing.run_cases(config, "sd14", [case])
    assert "tokens" in row["error"]
    assert editing.as_table([row])["seconds"].item() == "–"


def test_agreement_of_scores_and_masks() -> None:
    selection, attribution = Selection(ratio=0.5), Attribution()
    erase = CADErase(attribution, selection)
    scores = {"w": torch.tensor([[4.0, 3.0, -1.0, -2.0]])}
    same = agree(scores, {"w": 10 * scores["w"]}, erase)
    assert (same.rank_correlation, same.mask_overlap) == (pytest.approx(1.0), 1.0)
    other = {"w": torch.tensor([[3.0, -2.0, 4.0, -1.0]])}  # chooses 0 and 2; the reference 0 and 1
    assert agree(scores, other, erase).mask_overlap == 0.5
    amplify = CADAmplify(attribution, selection, LatentFile("none"))
    assert agree(scores, other, amplify).mask_overlap == 0.5  # 1 and 3; the reference 2 and 3
