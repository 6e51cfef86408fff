"""The wheel has all that the suite needs, and works from another folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_an_installed_wheel_needs_no_checkout(tmp_path: Path) -> None:
    def call(*command: str | Path) -> str:
        ended = subprocess.run(
            [str(each) for each in command], cwd=tmp_path, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    call(*pip, "wheel", REPOSITORY, "--no-deps", "--no-build-isolation", "-w", tmp_path)
    venv.create(tmp_path / "venv", with_pip=False)
    binaries = tmp_path / "venv" / "bin"
    (wheel,) = tmp_path.glob("*.whl")
    call(*pip, f"--python={binaries / 'python'}", "install", "--no-deps", wheel)
    site = call(binaries / "python", "-c", "import sysconfig as s; print(s.get_path('purelib'))")
    # The libraries are the tests' own: a line of a .pth adds their folder, without its .pth files.
    (Path(site.strip()) / "libraries.pth").write_text(sysconfig.get_path("purelib"))

    shown = call(binaries / "cad-suite", "--cfg", "job", "--resolve", "concept=church")
    assert f"results: {tmp_path}/results" in shown
    assert f"miniature: {tmp_path}/venv/share/concept-attribution/experiments" in shown
    where = "import cad, cad.places as p; print(cad.__file__, (p.REPOSITORY / 'run.py').is_file())"
    assert call(binaries / "python", "-c", where).split() == [
        str(Path(site.strip()) / "cad" / "__init__.py"),
        "True",
    ]
    assert "--edit-only" in call(binaries / "python", "-m", "cad.export", "--help")
