"""Commands as a user types them: random weights, debug=tiny."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import programs
import pytest
from programs import FORK, Ended
from record_files import read_records
from weights import write_weights

from cad.places import REPOSITORY
from experiments.run.results import read_lines

DETERMINISTIC = ("edit.safetensors", "records.jsonl", "metrics.json", "before_after.png")
TIMEOUT = 170  # seconds
HYDRA_NOISE = ("Traceback", "Error in call to target", "Error executing job", "full_key")
RATIOS = ("0.01", "0.02", "0.05")
EFFECT = ("effect.count=3", "effect.share=0.01", "effect.seeds=1")
Finished = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


def small(weights: Path, results: Path, *overrides: str) -> list[str]:
    paths = [f"paths.miniature={weights}", f"paths.results={results}"]
    return [*overrides, "debug=tiny", "logger=none", *paths]


def run(weights: Path, results: Path, *overrides: str) -> Ended:
    return programs.run(*small(weights, results, *overrides))


def listing(results: Path) -> set[str]:
    """All files of results, image sets and scores; the locks of running experiments are not."""
    return {
        path.relative_to(results).as_posix()
        for folder in ("runs", "images", "scores")
        for path in (results / folder).rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def fingerprint(results: Path) -> dict[str, str]:
    """Digests of everything that must not depend on interruptions, by relative path."""
    files = [p for p in (results / "runs").rglob("*") if p.name in DETERMINISTIC]
    files += (results / "images").rglob("*.png")
    files += (results / "images").rglob("records.jsonl")
    return {
        file.relative_to(results).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.fixture(scope="session")
def finished(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing disturbed, in a process of its own, and that checks its scores."""
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "run.py", *small(weights, results, *EFFECT)]
    environment = os.environ | programs.QUIET
    return results, subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def test_a_run_ends_with_table_picture_and_folder(finished: Finished) -> None:
    results, process = finished
    assert process.returncode == 0, process.stderr
    for words in ("accuracy on parachute", "the 10 others", "editing time", "resident growth"):
        assert words in process.stdout
    for words in ("Pearson r", "J on fresh noise (predicted change -", "other seeds' choice, %"):
        assert words in process.stdout
    (folder,) = (results / "runs").glob("mini-parachute-erase-*")
    others = {"cost.json", "config.yaml", "environment.json", "effects.csv", "manifest.json"}
    assert {file.name for file in folder.iterdir()} == {*DETERMINISTIC, *others, "table.md"}
    assert str(folder) in process.stdout


def test_a_rerun_is_instant_and_says_so(weights: Path, finished: Finished) -> None:
    results, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (results / "runs").rglob("*") if p.is_file()}
    process = run(weights, results, *EFFECT)
    assert process.returncode == 0, process.stderr
    assert "nothing was computed" in process.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    weights: Path, tmp_path: Path, finished: Finished
) -> None:
    results = tmp_path / "results"
    moments = (
        lambda: [path for path in results.glob("runs/.unfinished/*") if path.is_dir()],
        lambda: list(results.glob("runs/.unfinished/*/edit.safetensors")),
        lambda: len(list(results.glob("images/*/*.png"))) >= 15,  # in the second set
    )
    killed = 0
    for reached in moments:
        process = programs.start(*small(weights, results, *EFFECT))
        deadline = time.monotonic() + TIMEOUT
        while not reached() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed
    ended = run(weights, results, *EFFECT)
    assert ended.returncode == 0, ended.stderr
    assert fingerprint(results) == fingerprint(finished[0])
    assert listing(results) == listing(finished[0])


def test_two_runs_of_one_configuration_share_the_work(weights: Path, tmp_path: Path) -> None:
    command = small(weights, tmp_path, "edit=none", "limit=4")
    with ProcessPoolExecutor(2, FORK) as pool:
        ended = [each.result() for each in [pool.submit(programs.run, *command) for _ in "ab"]]
    assert [each.returncode for each in ended] == [0, 0], ended
    assert sorted("nothing was computed" in each.stdout for each in ended) == [False, True]


def test_a_sweep_over_ratios_costs_one_attribution_and_ends_with_a_plot(
    weights: Path, tmp_path: Path
) -> None:
    process = run(weights, tmp_path, "-m", f"ratio.value={','.join(RATIOS)}", "limit=4")
    assert process.returncode == 0, process.stderr
    (sweep,) = (tmp_path / "sweeps").iterdir()
    for name in ("plot.png", "plot.pdf", "sweep.csv", "table.md"):
        assert (sweep / name).stat().st_size > 0
    assert len(list((tmp_path / "runs").glob("mini-*"))) == len(RATIOS)
    assert len(list((tmp_path / "scores").glob("*.safetensors"))) == 1
    sets = 1 + len(RATIOS)  # the unedited images are made once
    assert len(list((tmp_path / "images").glob("*/set.json"))) == sets


def test_a_style_is_judged_among_styles(weights: Path, tmp_path: Path) -> None:
    process = run(
        weights, tmp_path, "concept=pop_art", "edit=rescale", "component=attn2", "ratio.value=0.1"
    )
    assert process.returncode == 0, process.stderr
    assert "style accuracy on pop_art" in process.stdout
    assert "the 4 others" in process.stdout


def test_a_method_that_trains_edits_two_concepts_once(weights: Path, tmp_path: Path) -> None:
    wanted = ("edit=esd", "concept=[church,tench]", "limit=4")
    process = run(weights, tmp_path, *wanted)
    assert process.returncode == 0, process.stderr
    assert "ESD church and tench, mini" in process.stdout
    assert "accuracy on church and tench, % (n = 2)" in process.stdout
    (folder,) = (tmp_path / "runs").glob("mini-church+tench-esd-*")
    assert len(read_lines(folder / "history.jsonl")) == 2  # debug=tiny: two iterations
    assert (folder / "training.png").exists()
    assert not list((tmp_path / "checkpoints").rglob("*.safetensors"))
    again = run(weights, tmp_path, *wanted, "evaluator=[face]")
    assert again.returncode == 0, again.stderr
    assert "the edit by esd taken from" in again.stderr
    assert "cached; cost of making it" in again.stdout


def test_all_kinds_of_evaluators_at_once(weights: Path, tmp_path: Path) -> None:
    wanted = ("concept=face", "evaluator=[nudity,clip_score,fid,lpips]", "limit=4")
    process = run(weights, tmp_path, *wanted)
    assert process.returncode == 0, process.stderr
    for words in (
        "nudity on face, detections",
        "clip score on general captions, 100 x cosine ↑",
        "fid on general captions",
        "lpips on the 3 others",
    ):
        assert words in process.stdout
    (folder,) = (tmp_path / "runs").glob("mini-face-erase-*")
    records = read_records(folder)
    assert sum("features" in record for record in records) == 8  # before and after
    assert {r["state"] for r in records if r["metric"] == "lpips"} == {"after"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("concept=face", "prompts=mini_captions"), ("concept=face has no images",)),
        (("concept=unicorn",), ("concept/unicorn", "parachute")),
        (("ratio.value=2",), ("ratio.value=2",)),
        (("images=3",), ("images",)),
        (("model=sd14",), ("CompVis/stable-diffusion-v1-4", "2.1 GB", "model=mini")),
        (("model=sd35",), ("stabilityai/stable-diffusion-3.5-medium", "accept the", "model=mini")),
        (("edit=rescale", "edit.factor=1"), ("edit.factor=1", "greater than 1")),
        (("prompts=objects", "prompts.template='{subject}{subjects}'"), ("prompts.template=",)),
    ],
)
def test_mistakes_end_with_a_message(
    weights: Path, tmp_path: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    process = run(weights, tmp_path, *overrides)
    assert process.returncode == 2, process.stderr
    for words_of_no_use in HYDRA_NOISE:
        assert words_of_no_use not in process.stderr
    for word in words:
        assert word in process.stderr
    assert not list(tmp_path.glob("runs/*-*"))


def test_help_explains_the_groups_without_pytorch() -> None:
    asked = [sys.executable, "-X", "importtime", "run.py", "--help"]
    process = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "pandas", "diffusers"}
    for words in ("concept", "edit", "ratio.value=0.02", "stained_glass"):
        assert words in process.stdout


def test_random_weights_are_edited_and_not_judged(weights: Path, tmp_path: Path) -> None:
    overrides = ("model=sd14", "model.weights=random-small", "model.adapter.resolution=64")
    process = run(weights, tmp_path, *overrides, "edit=uce")
    assert process.returncode == 0, process.stderr
    assert "RANDOM WEIGHTS" in process.stdout
    assert "editing time" in process.stdout
    assert not (tmp_path / "images").exists()
    refused = run(weights, tmp_path, *overrides, "edit=uce", "evaluator=accuracy")
    assert refused.returncode == 2
    assert "evaluator=accuracy has nothing to measure" in refused.stderr
