"""The command: plans of all tables for the paper's models, and what it says without them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from tables_fixture import NUMBERS, compose_tables

from cad.errors import UserError
from cad.models.base import resolve_device
from cad.models.hub import Source
from experiments import make
from experiments.items import preflight
from experiments.items.launch import RAY_ADDRESS
from experiments.items.overview import Plan, in_words
from experiments.make import program

# Every method meets every kind of concept once, and every axis is walked; a whole table takes long.
PARTS = {
    1: "concept=church",
    2: "",
    3: "concept=tench",
    4: "prompts=mma edit=none,rece",
    5: "concept=van_gogh",
    6: "concept=tench",
    7: "concept=church component=ff,residual",
    8: "concept=church edit=none,rece",
    9: "edit=none,amplify",
    10: "kind=style edit=concept_prune,erase",
    11: "concept=church variant=2,knock_out",
    12: "concept=parachute",
    13: "model=sdxl",
    14: "prompts=i2p model=sd35",
}
RUNS = {1: 6, 2: 7, 3: 5, 4: 2, 5: 4, 6: 2, 7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2, 13: 2, 14: 2}
IMAGES = {
    1: 6 * 5000,
    2: 7 * 4702 + 6 * 30000,  # the amplified model's captions are not measured
    3: 0,
    4: 2 * 1000,
    5: 5 * 100,
    6: 2 * 5000,
    7: 3 * 5000,
    8: 2 * 5000,
    9: 2 * 4702 + 30000,
    10: 0,
    11: 3 * 5000,
    12: 2 * 5000,
    13: 2 * 30000,
    14: 2 * 4702,
}


@pytest.fixture(autouse=True)
def no_gpu_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the machine of somebody who has just cloned the repository."""
    monkeypatch.setattr(preflight, "gpu_is_here", lambda cfg: False)
    monkeypatch.setattr(preflight, "weights_are_here", lambda cfg: False)


def ask(*overrides: str) -> None:
    places = [each for each in overrides if each.startswith("paths.")]
    program(compose_tables(*overrides), overrides, ["logger=none", *places])


@pytest.mark.parametrize("number", NUMBERS)
def test_every_table_is_planned_for_the_papers_models(
    number: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    part = f'filter="{PARTS[number]}"'
    ask(f"table=table{number:02d}", "dry=true", part, f"paths.results={tmp_path}")
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"{RUNS[number]} runs: 0 done", shown)
    assert f"{RUNS[number]} missing, 0 refused" in shown
    assert f"{IMAGES[number]:,} images" in shown
    assert "its weights are not on this machine" in caplog.text
    assert "needs a GPU" in caplog.text


def test_without_a_gpu_a_table_says_so_at_once_and_names_the_miniature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(make, "plan_item", None)  # is not come to
    with pytest.raises(UserError) as caught:
        ask("table=table01")
    for words in (
        "model=sd14 cannot be run here: it needs a GPU",
        "CompVis/stable-diffusion-v1-4",
        "2.1 GB",
        "make table1 MODEL=mini",
    ):
        assert words in str(caught.value)


def test_with_a_gpu_the_hubs_own_words_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(self: Source, without: object) -> None:
        raise UserError(f"The weights {self.repo} are not on this machine.")

    monkeypatch.setattr(Source, "locate", nowhere)
    monkeypatch.setattr(preflight, "gpu_is_here", lambda cfg: True)
    with pytest.raises(UserError, match=r"The weights CompVis/.* make table1 MODEL=mini"):
        ask("table=table01")


def test_runs_on_a_clusters_gpus_are_planned_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(Source, "locate", lambda self, without: None)
    launched: list[Plan] = []
    monkeypatch.setattr(make, "run_missing", lambda config, plan: launched.append(plan) or {})
    places = (f"paths.results={tmp_path}", f"output={tmp_path}", 'filter="concept=church"')
    ask("table=table01", "launcher=submitit_slurm", *places)
    ask("table=table01", "model=mini", "launcher=submitit_slurm", *places)
    cluster, here = ({run.cfg.device for run in plan.missing() if run.cfg} for plan in launched)
    assert cluster == {"cuda"}
    assert here == {str(resolve_device("auto"))}

    ask("table=table01", "launcher=submitit_slurm", "dry=true", *places)
    assert "weights are not on this machine" in caplog.text
    assert "needs a GPU" not in caplog.text
    ask("table=table01", "launcher=ray", "dry=true", *places, f'overrides="{RAY_ADDRESS}auto"')
    assert "needs a GPU" not in caplog.text
    for launcher in ("submitit_local", "ray"):
        with pytest.raises(UserError, match="it needs a GPU"):
            ask("table=table01", f"launcher={launcher}", *places)


def test_all_tables_go_on_past_one_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(make, "every_item", lambda kind: ["table03", "table12"])
    overrides = (f"paths.results={tmp_path}", "logger=none", "every=[table]")
    with pytest.raises(UserError, match="not made, for the reasons above: table03, table12"):
        program(compose_tables(*overrides), overrides, [])
    assert "table03: model=sd14 cannot be run here" in caplog.text
    assert "table12: model=sd21 cannot be run here" in caplog.text


def test_times_in_words() -> None:
    assert [in_words(each) for each in (34.2, 720, 12600)] == ["35 s", "12 min", "3.5 h"]
