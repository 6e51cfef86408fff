"""Benchmarks run whole, at the smallest size, and write what they measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import DictConfig

from cad.attribution import Attribution
from cad.edits import CADAmplify, CADErase
from cad.references import LatentFile
from cad.selection import Selection
from experiments.benchmarks import generation
from experiments.benchmarks.estimators import agree
from experiments.benchmarks.measuring import take_turns, write_benchmark

Configure = Callable[..., DictConfig]


def run(program: Any, config: DictConfig) -> None:
    program.main.__wrapped__(config)  # without Hydra's command line


def read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / "bench" / f"{name}.json").read_text())
    return found


def test_tasks_take_turns() -> None:
    calls: list[str] = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    measured = take_turns(tasks, rounds=2)
    assert "".join(calls).replace("a", "").replace("b", "") == ""
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert turns == ["a", "b", "a", "b"]
    assert {name: len(each.times) for name, each in measured.items()} == {"a": 2, "b": 2}


def test_a_benchmark_is_written_with_its_conditions(tmp_path: Path) -> None:
    table = pd.DataFrame([{"way": "fast", "ratio": "2.0"}])
    write_benchmark(tmp_path / "x", "Two ways", [{"seconds": 1.0}], table, torch.device("cpu"))
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["rows"] == [{"seconds": 1.0}]
    assert kept["environment"]["load"] >= 0
    text = (tmp_path / "x.md").read_text()
    assert text.startswith("Two ways. ")
    assert f"{torch.get_num_threads()} threads" in text
    assert "| fast" in text


def test_agreement_of_scores_and_masks() -> None:
    selection, attribution = Selection(ratio=0.5), Attribution()
    erase = CADErase(attribution, selection)
    scores = {"w": torch.tensor([[4.0, 3.0, -1.0, -2.0]])}
    same = agree(scores, {"w": 10 * scores["w"]}, erase)
    assert same == {"rank_correlation": pytest.approx(1.0), "mask_overlap": 1.0}
    other = {"w": torch.tensor([[3.0, -2.0, 4.0, -1.0]])}  # chooses 0 and 2; the reference 0 and 1
    assert agree(scores, other, erase)["mask_overlap"] == 0.5
    amplify = CADAmplify(attribution, selection, LatentFile("none"))
    assert agree(scores, other, amplify)["mask_overlap"] == 0.5  # 1 and 3; the reference 2 and 3


def test_three_ways_to_make_images(configure: Configure, tmp_path: Path) -> None:
    small = ("rounds=1", "images_per_class=1", "model.sampler.steps=2")
    run(generation, configure("generation", *small, "model.sampler.batch_size=4"))
    kept = read(tmp_path, "generation")
    assert [row[""] for row in kept["rows"]] == ["plain loop", "pipeline's batches", "generator"]
    assert kept["rows"][0]["ratio"] == 1.0
    assert "at most 0 grey levels" in kept["caption"] or "at most 1 grey levels" in kept["caption"]
