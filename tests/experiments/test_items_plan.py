"""Which runs are wanted, in which blocks they are launched, and what they take."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from tables_fixture import finished_run

from cad.errors import UserError
from experiments.items import launch
from experiments.items.estimate import (
    FEWEST,
    Work,
    is_on_one_device,
    missing_work,
    note_throughput,
    rates,
)
from experiments.items.item import parse_filter
from experiments.items.launch import (
    LINK,
    OVERRIDES,
    Block,
    _told_failures,
    blocks,
    check_launcher,
)
from experiments.items.plan import (
    Run,
    State,
    cartesian_blocks,
    find_runs,
    last_of_each_key,
    of_configuration,
)
from experiments.results import write_json

ASSUMED = {
    "mini": {
        "images_per_second": 4,
        "seconds_per_edit": {"erase": 15, "uce": 1},
        "seconds_per_attacked_prompt": 5,
    }
}
OBJECTS = ("model=mini", "prompts=objects", "images_per_class=3")


def product(block: tuple[tuple[str, ...], ...]) -> set[tuple[str, ...]]:
    return set(itertools.product(*block))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_disjoint_and_cover_exactly_what_is_missing(seed: int) -> None:
    chance = random.Random(seed)
    axes = [[f"{axis}{i}" for i in range(chance.randint(1, 4))] for axis in "abc"]
    whole = list(itertools.product(*axes))
    missing = chance.sample(whole, chance.randint(0, len(whole)))
    found = [product(block) for block in cartesian_blocks(missing)]
    assert sum(len(each) for each in found) == len(missing)
    assert set().union(*found) == set(missing)


def test_a_whole_product_is_one_block() -> None:
    assert cartesian_blocks(itertools.product("ab", "xyz")) == [(("a", "b"), ("x", "y", "z"))]
    assert cartesian_blocks([]) == []


def test_later_overrides_replace_earlier_ones() -> None:
    assert last_of_each_key(["a=1", "b=2", "a=3", "+c={}"]) == ("a=3", "b=2", "+c={}")
    assert of_configuration(["a=1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]) == ["a=1"]


def test_a_filter_names_values_of_axes() -> None:
    axes = {"concept": ["church", "tench"], "edit": ["uce", "rece"]}
    assert parse_filter("concept=church edit=uce,rece", axes) == {
        "concept": {"church"},
        "edit": {"uce", "rece"},
    }
    assert parse_filter("", axes) == {}
    with pytest.raises(UserError, match=r"no axis 'model'; choose from concept, edit"):
        parse_filter("model=mini", axes)
    with pytest.raises(UserError, match=r"concept has no 'golf', but church, tench"):
        parse_filter("concept=golf", axes)


def missing(*overrides: str) -> Run:
    return Run(overrides, State.MISSING)


def test_runs_of_other_keys_are_other_multiruns() -> None:
    runs = [missing(f"concept={c}", f"edit={e}") for c in ("a", "b") for e in ("uce", "esd")]
    runs += [missing(f"concept={c}", "edit=rescale", "edit.factor=2") for c in ("a", "b")]
    first, second = blocks(runs)
    assert first.sweep == ("concept=a,b", "edit=uce,esd")
    assert second.sweep == ("concept=a,b", "edit=rescale", "edit.factor=2")
    assert [run for block in (first, second) for run in block.runs] == runs


def test_the_command_of_a_block(tmp_path: Path) -> None:
    block = Block((missing("edit=uce"),), ("edit=uce",))
    _, *words = block.command(tmp_path, "joblib")
    assert words == [
        "run.py",
        "-m",
        "edit=uce",
        "hydra/launcher=joblib",
        f"hydra.sweep.dir={block.folder(tmp_path)}",
    ]
    assert "hydra/launcher" not in " ".join(block.command(tmp_path, None))


def test_a_launcher_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"launcher=ray needs hydra-ray-launcher.*'\.\[ray\]'"):
        check_launcher("ray")
    check_launcher(None)
    check_launcher("somebody_elses")


def test_failures_are_told_by_their_jobs(tmp_path: Path) -> None:
    runs = [missing("concept=a", "edit=uce"), missing("concept=b", "edit=uce")]
    for number, run in enumerate(runs):
        job = tmp_path / str(number)
        write_json(job / LINK, {"folder": None, "error": None if number else "no memory"})
        (job / OVERRIDES).parent.mkdir()
        (job / OVERRIDES).write_text("".join(f"- {each}\n" for each in (*run.overrides, "x=1")))
    assert _told_failures(tmp_path, runs) == {runs[0].overrides: "no memory"}


def test_runs_are_found_refused_and_counted(tmp_path: Path) -> None:
    place = (*OBJECTS, f"paths.results={tmp_path}")
    wanted = [
        (*place, "concept=church", "edit=none"),
        (*place, "concept=church", "edit=erase"),
        (*place, "concept=tench", "edit=erase"),
        (*place, "concept=nudity", "edit=erase"),
        (*place, "concept=church", "edit=erase", "evaluator=[clip_score]"),
        (*place, "concept=church", "edit=unheard_of"),
    ]
    runs = list(find_runs([*wanted, wanted[0]]).values())
    assert [run.state for run in runs] == 3 * ["missing"] + ["refused", "missing", "refused"]
    assert "concept=nudity is unknown to model=mini" in runs[3].reason
    assert "unheard_of" in runs[5].reason
    # Unedited and two edited sets of 30; captions unedited and edited, 500 each; two edits.
    assert missing_work(runs, runs, {}) == Work({"mini": 90 + 1000}, {("mini", "erase"): 2})
    assert missing_work(runs, runs[:1], {}) == Work({"mini": 30}, {})
    done = [Run(runs[0].overrides, State.DONE, "", runs[0].cfg, runs[0].result), *runs[1:]]
    assert missing_work(done, done[:2], {}) == Work({"mini": 30}, {("mini", "erase"): 1})


def test_published_prompts_are_counted_without_their_files(tmp_path: Path) -> None:
    wanted = ("model=sd14", "concept=nudity", "edit=none", "limit=100", f"paths.results={tmp_path}")
    runs = list(find_runs([wanted]).values())
    assert missing_work(runs, runs, {"i2p": 4702}) == Work({"sd14": 100}, {})


def test_attacked_prompts_are_counted_with_every_attack(tmp_path: Path) -> None:
    attacked = (*OBJECTS, "concept=church", "edit=uce", "attack=[p4d,unlearn_diff]", "evaluator=[]")
    wanted = [(*attacked, "+evaluator={}", *more) for more in ((), ("attack.limit=2",))]
    runs = list(find_runs(wanted).values())
    assert missing_work(runs, runs[1:], {}).attacked == {"mini": 2 * 2}
    assert missing_work(runs, runs[:1], {}).attacked == {"mini": 2 * 30}  # at most
    work = Work({}, {}, {"mini": 4})
    assert rates([], ASSUMED, tmp_path, work).seconds(work) == 4 * 5


def test_speed_is_a_devices_only_where_there_is_one() -> None:
    settings = [(), ("engine.processes=2",), ("engine=ray",)]
    runs = find_runs([("model=mini", "edit=none", "device=cpu", *each) for each in settings])
    assert [is_on_one_device(run) for run in runs.values()] == [True, False, False]


def test_time_is_estimated_from_what_was_measured(tmp_path: Path) -> None:
    work = Work({"mini": 800}, {("mini", "erase"): 2})
    assumed = rates([], ASSUMED, tmp_path, work)
    assert assumed.seconds(work) == 800 / 4 + 2 * 15
    assert not assumed.measured
    note_throughput(tmp_path, "mini", FEWEST - 1, 1.0)  # too few to tell
    assert rates([], ASSUMED, tmp_path, work) == assumed
    note_throughput(tmp_path, "mini", 1000, 200.0)
    run = finished_run(tmp_path, "x", [], cost={"seconds": 7.0})
    (found,) = find_runs([("model=mini", "edit=erase")]).values()
    measured = rates([Run((), State.DONE, "", found.cfg, run.result)], ASSUMED, tmp_path, work)
    assert measured.seconds(work) == 800 / 5 + 2 * 7
    assert measured.measured == {"mini"}
