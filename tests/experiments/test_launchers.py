"""Launchers: a job that dies takes no other along, and resources follow the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from cad.errors import UserError
from experiments.config import REPOSITORY, register_resolvers
from experiments.launchers import Task, slurm_executor

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

HERE = Path(__file__).parent
TIMEOUT = 170  # seconds
DEAD, BUGGY = "tench", "golf_ball"  # what launched_app makes of these concepts


def launch(
    folder: Path, *overrides: str, path: Path | None = None, gpus: str = ""
) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": "1"}
    if path is not None:
        own["PATH"] = f"{path}:{os.environ['PATH']}"
    return subprocess.run(
        [
            sys.executable,
            str(HERE / "launched_app.py"),
            "-m",
            *overrides,
            f"paths.results={folder}",
            f"hydra.sweep.dir={folder}/sweep",
        ],
        cwd=REPOSITORY,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def seen(folder: Path, number: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "sweep" / str(number) / "seen.json").read_text())
    return found


def error(folder: Path, number: int) -> str:
    told = json.loads((folder / "sweep" / str(number) / "result.json").read_text())["error"]
    assert isinstance(told, str)
    return told


def test_local_jobs_die_alone_and_have_a_gpu_each(tmp_path: Path) -> None:
    """The first dies at once, the others are waited for, and start when a GPU is free."""
    concepts = f"concept={DEAD},church,parachute"
    ended = launch(tmp_path, concepts, "seed=1", "hydra/launcher=submitit_local", gpus="5,GPU-7")
    assert ended.returncode == 2, ended.stderr
    assert "its process ended without a result" in error(tmp_path, 0)
    assert "run 0 of the sweep failed" in ended.stdout
    gpus = [seen(tmp_path, number)["gpu"] for number in (1, 2)]
    assert gpus[0] == "GPU-7"
    assert gpus[1] in ("5", "GPU-7")
    output = re.search(r"its output: (\S+)", error(tmp_path, 0))
    assert output is not None
    assert Path(output[1]).exists()


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


def test_slurm_jobs_die_alone_in_one_array(tmp_path: Path, cluster: Path) -> None:
    concepts = f"concept={DEAD},{BUGGY},church"
    ended = launch(tmp_path, concepts, "seed=0", "hydra/launcher=submitit_slurm", path=cluster)
    assert ended.returncode == 1, ended.stderr  # a bug is shown as one
    assert "ended without a result (FAILED)" in error(tmp_path, 0)
    assert "ValueError: a bug" in error(tmp_path, 1)
    assert "ValueError: a bug" in ended.stderr
    assert seen(tmp_path, 2)["model"] == "mini"
    assert "#SBATCH --array=0-2%3" in (cluster / "submitted.sh").read_text().splitlines()


def test_without_a_cluster_the_scripts_can_be_written(tmp_path: Path) -> None:
    """An array for each model, with what this model needs."""
    sweep = ("model=sd14,sdxl", "concept=church,parachute", "hydra/launcher=submitit_slurm")
    own = ("hydra.launcher.partition=gpu", "hydra.launcher.setup=[module load cuda]")
    ended = launch(tmp_path, *sweep, "hydra.launcher.submit=false", *own)
    assert ended.returncode == 0, ended.stderr
    scripts = {path.name: path.read_text() for path in (tmp_path / "sweep").glob("*.sh")}
    assert scripts.keys() == {"sbatch-0.sh", "sbatch-2.sh"}
    for name, model, minutes, memory in (
        ("sbatch-0.sh", "sd14", 720, 32),
        ("sbatch-2.sh", "sdxl", 1440, 48),
    ):
        lines = scripts[name].splitlines()
        for wanted in (
            "#SBATCH --array=0-1%2",
            "#SBATCH --gpus-per-node=1",
            "#SBATCH --cpus-per-task=8",
            f"#SBATCH --job-name=launched_app-{model}",
            f"#SBATCH --mem={memory}GB",
            "#SBATCH --partition=gpu",
            f"#SBATCH --time={minutes}",
            "module load cuda",
        ):
            assert wanted in lines
        assert f"{sys.executable} -u -m submitit.core._submit" in scripts[name]
    assert not (tmp_path / "sweep" / "0").exists()


@pytest.mark.parametrize(("model", "gpus"), [("mini", 0), ("sd14", 1)])
def test_rays_tasks_ask_for_what_the_model_needs(model: str, gpus: int) -> None:
    register_resolvers()
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        overrides = [f"model={model}", "hydra/launcher=ray"]
        cfg = hydra.compose("config", overrides, return_hydra_config=True)
    assert cfg.hydra.launcher.ray.remote.num_gpus == gpus


def test_without_its_plugin_ray_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_ray_launcher.ray_launcher", None)
    launcher = hydra.utils.get_class("hydra_plugins.concept_attribution.RayLauncher")()
    with pytest.raises(UserError, match=r"needs hydra-ray-launcher.*pip install -e '\.\[ray\]'"):
        launcher.setup(hydra_context=None, task_function=None, config=OmegaConf.create())


def test_without_a_cluster_submitting_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    task = Task(0, [], {"submitit_folder": str(tmp_path), "max_num_timeout": 0})
    with pytest.raises(UserError, match=r"srun.*hydra\.launcher\.submit=false"):
        slurm_executor(task)
