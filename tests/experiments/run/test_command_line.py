"""How programs end: one message for a user's mistake, a traceback for a bug; jobs fail alone."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path

import hydra
import pytest
from hydra.errors import ConfigCompositionException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from programs import Ended, call, run

from cad.errors import UserError
from cad.places import REPOSITORY
from experiments.run.command_line import INTERRUPTED, USAGE_ERROR, JobEnds, find_mistake
from experiments.run.configuration import compose

HERE = Path(__file__).parent


def test_a_constructors_user_error_loses_its_wrapping() -> None:
    node = {"_target_": "cad.selection.Selection", "ratio": 7.0}
    with pytest.raises(InstantiationException) as caught:
        hydra.utils.instantiate({"inner": node})
    message = find_mistake(caught.value)
    assert message is not None
    assert message.startswith("ratio.value=7.0")
    assert "Error in call" not in message


def test_a_bug_inside_a_constructor_is_no_mistake() -> None:
    with pytest.raises(InstantiationException) as caught:
        hydra.utils.instantiate({"_target_": "cad.selection.Selection", "ratoi": 7.0})
    assert find_mistake(caught.value) is None


def test_wrong_configurations_are_told_in_a_line() -> None:
    with pytest.raises(OmegaConfBaseException) as caught:
        _ = OmegaConf.create({"a": "${a}"}).a
    assert find_mistake(caught.value) == "a: Recursive interpolation detected"
    assert find_mistake(ConfigCompositionException("no such key")) == "no such key"
    told = find_mistake(ConfigCompositionException("Could not load 'hydra/launcher/ray'"))
    assert told is not None
    assert "pip install -e '.[slurm]' or '.[ray]'" in told


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("concpt", "; did you mean concept?"),
        ("sead", "; did you mean seed?"),
        ("ratio.valu", "; did you mean ratio?"),
        ("xyz", "."),
    ],
)
def test_a_setting_that_is_none_is_told_with_one_that_is_near(key: str, near: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        compose([f"{key}=1"])
    assert find_mistake(caught.value) == (
        f"{key} is no setting{near} python run.py --cfg job shows all"
    )


def test_user_errors_and_full_disks_are_told_and_bugs_are_not() -> None:
    assert find_mistake(UserError("seed=-1")) == "seed=-1"
    full = find_mistake(OSError(errno.ENOSPC, "No space left on device", "/x/metrics.json"))
    assert full is not None
    assert "/x/metrics.json (No space left on device): make room" in full
    assert find_mistake(OSError(errno.ENOENT, "No such file", "/x")) is None
    assert find_mistake(ValueError("a bug")) is None


def test_a_multirun_tells_how_many_are_done_and_the_time_to_go(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
    task = ["concept=church,tench", "seed=range(0,3)", "edit=uce"]
    told = {"overrides": {"task": task, "hydra": []}, "launcher": launcher, "job": {"num": 1}}
    told |= {"sweep": {"dir": str(tmp_path)}}
    config = OmegaConf.create({"hydra": told, "paths": {"results": str(tmp_path)}})
    ends, clock = JobEnds(), iter((100.0, 130.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    ends.on_multirun_start(config)
    with caplog.at_level("INFO"):
        ends._tell_progress(config)
    assert caplog.messages == ["2 of 6 runs done: 0:00:30 so far, about 0:01:00 to go"]


def launch(folder: Path, *overrides: str) -> Ended:
    multirun = ["-m"] if any("," in override for override in overrides) else []
    places = [f"paths.results={folder}", f"hydra.sweep.dir={folder}/sweep"]
    return call(HERE / "launched_app.py", *multirun, *overrides, *places)


def told(folder: Path, number: int) -> str | None:
    note = json.loads((folder / "sweep" / str(number) / "result.json").read_text())
    error: str | None = note["error"]
    return error


def test_a_mistake_is_one_line_and_a_bug_a_traceback(tmp_path: Path) -> None:
    refused = launch(tmp_path, "concept=golf_ball")
    assert (refused.returncode, refused.stderr) == (USAGE_ERROR, "golf balls are refused\n")
    bug = launch(tmp_path, "concept=gas_pump")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
    interrupted = launch(tmp_path, "concept=chain_saw")
    assert interrupted.returncode == INTERRUPTED
    assert "the same command goes on" in interrupted.stderr
    assert "Traceback" not in interrupted.stderr


def test_results_that_cannot_be_written_are_told_before_hydra_writes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for concepts in ("concept=church", "concept=church,tench"):
        refused = launch(tmp_path / "file", concepts)
        assert refused.returncode == USAGE_ERROR
        assert len(refused.stderr.splitlines()) == 1
        assert "paths.results=" in refused.stderr


def test_a_group_that_is_no_choice_is_named() -> None:
    """Hydra itself does not say which."""
    ended = run("model=null", "logger=none")
    assert ended.returncode == USAGE_ERROR
    assert "model=null: choose from mini, sd14" in ended.stderr


@pytest.mark.parametrize("folder", ["", "null", "'~/x'"])
def test_hydras_own_folder_is_named_before_hydra_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("logger=none", f"hydra.run.dir={folder}")
    assert ended.returncode == USAGE_ERROR
    assert "hydra.run.dir" in ended.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "given", "message"),
    [
        ("experiments/ring_a_bell.py", "store=FILE", "store=.*cannot be written to"),
        ("experiments/tables/status.py", "paths.results=", "paths.results is empty"),
        ("experiments/tables/report.py", "paths.results=FILE", "paths.results=.*cannot be"),
        ("experiments/tables/status.py", "fast=maybe", "fast='maybe' .* true or false"),
        ("experiments/ring_a_bell.py", "search=null", "search=None is not allowed"),
        ("experiments/ring_a_bell.py", "search.avoid=abc", "search.avoid='abc' .* a list of texts"),
        ("experiments/miniature/train.py", "work=", "work is empty: name a folder"),
    ],
)
def test_every_program_tells_of_mistakes_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    overrides = [given.replace("FILE", str(tmp_path / "file"))]
    if not given.startswith(("paths", "work")):
        overrides.append(f"paths.results={tmp_path / 'results'}")
    ended = call(REPOSITORY / program, *overrides)
    assert ended.returncode == USAGE_ERROR
    assert re.search(message, ended.stderr), ended.stderr
    assert {each.name for each in tmp_path.iterdir()} <= {"file", "results"}


def test_failed_jobs_do_not_stop_the_others(tmp_path: Path) -> None:
    """A summary follows, of notes alone: an earlier one of the same command counts no more."""
    (tmp_path / "sweep" / "9").mkdir(parents=True)
    (tmp_path / "sweep" / "9" / "result.json").write_text('{"folder": null, "error": "old"}')
    ended = launch(tmp_path, "concept=golf_ball,gas_pump,church")
    assert ended.returncode == USAGE_ERROR
    assert told(tmp_path, 0) == "golf balls are refused"
    assert told(tmp_path, 1) == "ValueError: a bug"
    assert told(tmp_path, 2) is None
    assert "Traceback" in ended.stderr  # the bug's
    assert "run 0 of the sweep failed: golf balls are refused" in ended.stderr
    assert "old" not in ended.stderr


@pytest.mark.parametrize("launcher", ["submitit_local", "processes"])
def test_jobs_in_processes_know_the_resolvers_and_tell_of_mistakes(
    tmp_path: Path, launcher: str
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    ended = launch(tmp_path, "concept=golf_ball,church", f"hydra/launcher={launcher}")
    assert ended.returncode == USAGE_ERROR, ended.stderr
    assert "run 0 of the sweep failed: golf balls are refused" in ended.stderr
    seen = json.loads((tmp_path / "sweep" / "1" / "seen.json").read_text())
    ratios = OmegaConf.load(REPOSITORY / "conf" / "fragments" / "ratios_erase.yaml")
    assert seen == {"ratio": ratios.mini.church}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder of PATH with the commands of SLURM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        command = folder / name
        command.write_text(f"#!{sys.executable}\n" + (HERE / "fake_slurm.py").read_text())
        command.chmod(0o755)
    return folder


def test_slurm_jobs_ask_for_what_runs_need_and_die_alone(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = ("hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    ended = launch(tmp_path, "concept=church,tench", *slurm)
    assert ended.returncode == USAGE_ERROR
    assert "has not produced any output (state: FAILED)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "sweep" / "0" / "seen.json").exists()
    lines = (cluster / "submitted.sh").read_text().splitlines()
    for wanted in (
        "#SBATCH --array=0-1%2",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --mem=64GB",
        "#SBATCH --time=1440",
        "#SBATCH --partition=gpu",
    ):
        assert wanted in lines


def test_without_a_cluster_submitting_says_so(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    ended = launch(tmp_path, "concept=church,tench", "hydra/launcher=slurm")
    assert ended.returncode == USAGE_ERROR
    assert 'Could not detect "srun"' in ended.stderr
