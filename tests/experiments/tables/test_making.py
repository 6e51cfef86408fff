"""Which runs a command makes, what it says where some cannot be made, and what jobs it starts."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tables_fixture import finished_run, row

from cad.errors import UserError
from cad.identity import short_digest
from cad.models.hub import Source
from cad.places import REPOSITORY
from experiments.run import experiment
from experiments.run.configuration import compose
from experiments.run.results import ResultFolder
from experiments.tables import make
from experiments.tables.exhibit import Exhibit, ListedRun
from experiments.tables.lookup import RunNames


class Bench:
    """Stands for preparing and running: counts what is run, and fails where it is told to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failing: dict[str, Exception] = {}

    def prepare(self, cfg: DictConfig) -> Any:
        if cfg.seed < 0:
            raise UserError(f"seed={cfg.seed} is not allowed")
        edit = cfg.edit._target_.rpartition(".")[2].lower()
        name = f"{cfg.model.name}-{cfg.concept.name}-{edit}"
        folder = ResultFolder(Path(cfg.paths.runs), name, short_digest([name, cfg.seed]))
        source = Source("a/repository", None, None, 1.0, "a licence", False, "")
        model = SimpleNamespace(name=cfg.model.name, weights="published", t5=True, source=source)
        return SimpleNamespace(cfg=cfg, name=name, folder=folder, model=model)

    def run(self, prepared: Any, group: str) -> Path:
        self.ran.append(prepared.name)
        for part, error in self.failing.items():
            if part in prepared.name:
                raise error
        rows = [row(50.0, 40.0, 60.0, state=state) for state in ("before", "after")]
        made = finished_run(prepared.folder.runs.parent / "made", prepared.name, rows)
        prepared.folder.runs.mkdir(exist_ok=True)
        return made.folder.rename(prepared.folder.final)


@functools.cache
def composed(*overrides: str) -> DictConfig:
    return compose(overrides)


def quick(overrides: Sequence[str]) -> DictConfig:
    """A configuration, composed once for all folders of results."""
    folders = [each for each in overrides if each.startswith("paths.results=")]
    cfg = composed(*(each for each in overrides if each not in folders)).copy()
    cfg.paths.results = folders[-1].partition("=")[2] if folders else "nowhere"
    return cfg


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    stand_in = Bench()
    monkeypatch.setattr(experiment, "prepare", stand_in.prepare)
    monkeypatch.setattr(make, "prepare", stand_in.prepare)
    monkeypatch.setattr(make, "run", stand_in.run)
    monkeypatch.setattr(make, "composer", lambda folders: nullcontext(quick))
    return stand_in


def command(results: Path, *overrides: str) -> None:
    given = [f"paths.results={results}", "logger=none", *overrides]
    make.make(quick(given), given)


def markdown(results: Path, name: str = "table12-mini") -> str:
    return (results / "reproduction" / f"{name}.md").read_text()


TABLE = ("table=table12", "model=mini")


def test_missing_runs_are_made_once_and_shown(tmp_path: Path, bench: Bench) -> None:
    command(tmp_path, *TABLE, 'making.filter="concept=parachute"')
    assert bench.ran == ["mini-parachute-noedit", "mini-parachute-cadamplify"]
    assert "Not run yet: 2 runs of 4." in markdown(tmp_path)
    command(tmp_path, *TABLE)
    assert bench.ran[2:] == ["mini-cassette_player-noedit", "mini-cassette_player-cadamplify"]
    written = markdown(tmp_path)
    assert "| Parachute       | 50.0 [40.0, 60.0] (63.20) | 50.0 [40.0, 60.0] (96.40) |" in written
    command(tmp_path, *TABLE)
    assert len(bench.ran) == 4
    assert markdown(tmp_path) == written


def test_overrides_of_the_command_are_every_runs(tmp_path: Path, bench: Bench) -> None:
    command(tmp_path, *TABLE, 'making.filter="concept=parachute edit=none"')
    command(tmp_path, *TABLE, 'making.filter="concept=parachute edit=none"', "seed=1")
    assert len(bench.ran) == 2


def test_seeds_are_runs_of_one_table(tmp_path: Path, bench: Bench) -> None:
    part = 'making.filter="concept=parachute"'
    command(tmp_path, *TABLE, part, "making.seeds=[0,4]")
    assert bench.ran == ["mini-parachute-noedit"] * 2 + ["mini-parachute-cadamplify"] * 2
    assert "| Parachute       | 50.0 ± 0.0 [" in markdown(tmp_path)
    for wrong, words in (
        (["making.seeds=[0]"], "two seeds or more"),
        (["making.seeds=[0,x]"], "making.seeds='x' is not allowed"),
        (["making.seeds=3"], "making.seeds=3 is not allowed: it is a list"),
        (["making.seeds=[0,4]", "seed=4"], "both seed and making.seeds"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            command(tmp_path, *TABLE, *wrong)
    with pytest.raises(UserError, match=r"of Figure 7: a table has"):
        command(tmp_path, "figure=figure7", "model=mini", "making.seeds=[0,4]")
    assert len(bench.ran) == 4


@pytest.mark.parametrize("error", [UserError("no memory left"), RuntimeError("a bug")])
def test_a_failed_run_does_not_stop_the_others_and_is_noted(
    error: Exception, tmp_path: Path, bench: Bench
) -> None:
    bench.failing["cassette_player"] = error
    with pytest.raises(UserError, match=r"2 of 4 runs left no result: .*(no memory|a bug)"):
        command(tmp_path, *TABLE)
    assert len(bench.ran) == 4
    assert f"{error}." in markdown(tmp_path)
    assert "Failed, 2 runs:" in markdown(tmp_path)
    bench.failing.clear()
    command(tmp_path, *TABLE)
    assert len(bench.ran) == 6


def test_dry_says_what_would_be_run_and_refuses_what_cannot(
    tmp_path: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    command(tmp_path, *TABLE, "making.dry=true", "making.methods=+uce")
    shown = capsys.readouterr().out
    assert shown.count("missing") == 6
    assert "concept=parachute edit=uce" in shown
    with pytest.raises(UserError, match=r"seed=-1 is not allowed"):
        command(tmp_path, *TABLE, "making.dry=true", "seed=-1")
    assert "refused" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"seed=-1 is not allowed"):
        command(tmp_path, *TABLE, "seed=-1")
    assert not bench.ran
    assert not (tmp_path / "reproduction").exists()


def test_one_run_is_made_by_its_number(tmp_path: Path, bench: Bench) -> None:
    command(tmp_path, *TABLE, "making.run=3")
    assert bench.ran == ["mini-parachute-cadamplify"]
    assert not (tmp_path / "reproduction").exists()
    with pytest.raises(UserError, match=r"making\.run=4: Table 12 has runs 0 to 3"):
        command(tmp_path, *TABLE, "making.run=4")
    with pytest.raises(UserError, match=r"searched against SD's text encoder"):
        command(tmp_path, "table=table04", "model=mini", "making.run=0")


def test_several_are_made_past_those_that_cannot_be(
    tmp_path: Path,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    made: list[str] = []

    def refuse(command: object, exhibit: Exhibit) -> None:
        made.append(exhibit.name)
        if exhibit.stem == "table08":
            raise UserError("no weights")

    monkeypatch.setattr(make, "make_exhibit", refuse)
    with pytest.raises(UserError, match=r"for the reasons above: Table 8$"):
        command(tmp_path, "table=all", "model=sd21")
    assert made == ["table08-sd21", "table09-sd21", "table12-sd21"]
    assert "Table 8: no weights" in caplog.text
    assert "Table 1 is of sd14 alone" in caplog.text


def test_without_a_gpu_a_table_says_so_at_once_and_names_the_miniature(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "resolve_device", lambda device: torch.device("cpu"))
    part = 'making.filter="concept=parachute edit=none"'
    with pytest.raises(UserError) as caught:
        command(tmp_path, "table=table12", part)
    said = "model=sd21 cannot be run here: it needs a GPU"
    for words in (said, "a/repository", "1 GB", "python run.py table=table12 model=mini"):
        assert words in str(caught.value)
    assert not bench.ran
    monkeypatch.setattr(Source, "locate", lambda self, without: None)
    command(tmp_path, "table=table12", part, "device=cpu")  # meant, then
    assert len(bench.ran) == 1


def test_with_a_gpu_the_hubs_own_words_are_shown(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(self: Source, without: object) -> None:
        raise UserError(f"The weights {self.repo} are not on this machine.")

    monkeypatch.setattr(Source, "locate", nowhere)
    monkeypatch.setattr(make, "resolve_device", lambda device: torch.device("cuda"))
    with pytest.raises(UserError, match=r"The weights a/repository .* table=table12 model=mini"):
        command(tmp_path, "table=table12", 'making.filter="concept=parachute edit=none"')


def test_a_launcher_gets_the_missing_runs_as_jobs_and_a_last_one_renders(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs: list[list[str]] = []

    def start(program: list[str], **settings: object) -> SimpleNamespace:
        programs.append(program[1:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(make.subprocess, "run", start)
    launcher = ("hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    monkeypatch.setattr(make, "_launcher", lambda: launcher)
    command(tmp_path, *TABLE, "making.run=0")
    monkeypatch.setattr(make, "option_folders", lambda: ["/mine/conf"])
    command(tmp_path, *TABLE, "seed=1")
    jobs, rendering = programs
    assert jobs[:2] == [str(REPOSITORY / "run.py"), "-m"]
    assert "making.run=0,1,2,3" in jobs
    assert "making.render=true" in rendering
    for words in (*launcher, "seed=1", "table=table12", "hydra.searchpath=[file:///mine/conf]"):
        assert words in jobs
        assert words in rendering
    assert f"hydra.sweep.dir={tmp_path}/sweeps/table12-mini" in jobs
    assert not bench.ran[1:]
    monkeypatch.setattr(make.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    with pytest.raises(UserError, match=r"the jobs' logs are in .*sweeps/table12-mini"):
        command(tmp_path, *TABLE, "seed=1")


def test_what_a_job_failed_with_is_noted(tmp_path: Path, bench: Bench) -> None:
    note = tmp_path / "sweeps" / "table12-mini" / "2" / "result.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"folder": None, "error": "no memory"}))
    command(tmp_path, *TABLE, "making.render=true")
    assert "Failed, 1 run: no memory." in markdown(tmp_path)
    assert "Not run yet: 3 runs of 4." in markdown(tmp_path)


def test_a_launchers_job_launches_none(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=4", "hydra.run.dir=x"]
    for mode, expected in ((RunMode.RUN, tuple(chosen[:2])), (RunMode.MULTIRUN, ())):
        told = OmegaConf.create({"mode": mode, "overrides": {"hydra": chosen}})
        monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
        monkeypatch.setattr(HydraConfig, "get", lambda told=told: told)
        assert make._launcher() == expected


def test_a_result_of_what_is_done_afterwards_is_looked_for(tmp_path: Path) -> None:
    """By its folder's name: only a run that may be there is composed."""
    (tmp_path / "mini-church-erase+refilled+revived-0123").mkdir()

    def refuse(overrides: Sequence[str], name: str = "config") -> DictConfig:
        raise UserError("composed")

    for after, refused in (
        ("after=[refilled,revived]", "composed"),
        ("after=revived", ""),
        ("seed=0", ""),
    ):
        run = ListedRun(0, {}, ("model=mini", "concept=church", "edit=erase", after))
        assert RunNames(tmp_path).find(run, refuse).refused == refused
