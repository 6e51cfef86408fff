"""What the items take: the simulation by hand, configurations as composed, and the printed plan."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from omegaconf import DictConfig

from cad.errors import UserError
from experiments import plan
from experiments.composing import composer
from experiments.config import plain
from experiments.plan import ItemRuns, Job, Outcome, Step, distinct, in_order, program, simulate

EDIT = Step(("uce", "m", "1"), 3.0, 1.0, "uce")
SHARED = Step(("images", "m", "none"), 10.0, 5.0, "10 images")
OWN = Step(("images", "m", "uce"), 10.0, 5.0, "10 images")


def job(*steps: Step, start: float = 1.0, unedited: bool = False) -> Job:
    return Job("a run", frozenset(), steps, start, unedited)


def test_a_job_takes_its_steps_one_after_the_other() -> None:
    alone = job(EDIT, SHARED, OWN)
    assert alone.seconds == 24
    assert simulate([alone], 4) == Outcome(wall=24, held=24, worked=24)


def test_what_is_shared_is_made_once_and_waited_for() -> None:
    """The second edits until 4, waits for the unedited images until 11, makes its own until 21."""
    both = [job(SHARED, unedited=True), job(EDIT, SHARED, OWN)]
    assert simulate(both, 2) == Outcome(wall=21, held=11 + 21, worked=11 + 4 + 10)
    assert simulate(both, 1) == Outcome(wall=11 + 14, held=25, worked=25)
    assert distinct(both) == [SHARED, EDIT, OWN]


def test_jobs_start_when_a_gpu_is_free() -> None:
    jobs = [job(Step(("images", "m", str(n)), n, 0, "")) for n in (4, 2, 1)]
    assert simulate(jobs, 2).wall == 5  # 1 + 4 beside 1 + 2, then 1 + 1
    assert simulate(jobs, 3).wall == 5
    assert simulate(jobs, 1).wall == 10
    assert simulate([], 3) == Outcome(0, 0, 0)


def test_the_unedited_come_first_then_the_longest() -> None:
    short, long, first = job(EDIT), job(EDIT, OWN), job(SHARED, unedited=True)
    assert in_order([short, long, first]) == [first, long, short]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=sd14", "concept=tench", "edit=rece"),
        ("concept=van_gogh", "model=sd14", "edit=esd"),
        ("edit=erase", "model=sd14", "concept=nudity", "ratio.value=0.02", "component=attn1"),
        ("model=mini", "concept=church", "evaluator=[]", "+evaluator={}", "edit=rescale"),
    ],
)
def test_configurations_are_those_that_hydra_composes(overrides: tuple[str, ...]) -> None:
    with composer() as compose:
        runs = ItemRuns(compose)
        runs(("model=sd14", "concept=parachute", "edit=rece"))
        found, expected = runs(overrides), compose("config", overrides)
        for key in expected:
            assert _resolved(found, key) == _resolved(expected, key)


def _resolved(cfg: DictConfig, key: str) -> object:
    """Of one key; what it is when it cannot be resolved, such as a factor that has to be given."""
    try:
        return plain(cfg[key])
    except Exception as error:
        return type(error)


def planned(*overrides: str) -> DictConfig:
    with composer() as compose:
        return compose("plan", list(overrides))


def test_the_plan_counts_each_image_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tables 12 (two classes, amplified) and 9 (nudity) of SD-2.1, on given speed."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("COLUMNS", "150")
    names = {"table": ["table09", "table12"], "figure": ["figure2"]}
    monkeypatch.setattr(plan, "every_item", names.get)
    given = ("model=sd21", "gpus=4", f"paths.results={tmp_path}")
    program(planned(*given, "+images_per_second.sd21=5"))
    rows = dict(re.findall(r"│ (Table \d+|all, shared once) +│(.*)│\n", capsys.readouterr().out))
    cells = {name: [cell.strip() for cell in row.split("│")] for name, row in rows.items()}
    # Unedited, rece, uce, erase: I2P and COCO; amplify: I2P. Three sets of Imagenette, one shared.
    assert cells["Table 9"][:4] == ["sd21", "5", f"{5 * 4702 + 4 * 30000:,}", "4"]
    assert cells["Table 12"][:4] == ["sd21", "4", "15,000", "2"]
    assert cells["all, shared once"][1:4] == ["9", f"{5 * 4702 + 4 * 30000 + 15000:,}", "6"]
    # 15,000 images at 5 a second, two amplifications of 150 s and four starts of 60 s.
    assert cells["Table 12"][4] == f"{(15000 / 5 + 2 * 150 + 4 * 60) / 3600:.1f}"
    assert "sd21 5 (given)" in caplog.text
    assert "The longest run: Table 9, edit=erase: scores 2 min" in caplog.text


def test_a_number_of_gpus_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="gpus=0 is not allowed"):
        program(planned("gpus=0"))
