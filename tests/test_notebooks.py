"""The notebooks run from their first cell to their last, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest

from cad.places import REPOSITORY

FOLDER = Path("docs", "notebooks")
QUICK = {"attribution": {"steps": 1, "samples": 1}, "pictures": 1, "steps": 1, "ratio": 0.3}


@pytest.mark.parametrize("name", ["erase", "places"])
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(REPOSITORY / FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
    monkeypatch.chdir(tmp_path / FOLDER)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    drawn: list[Any] = []
    with matplotlib.rc_context({"backend": "agg"}):
        import matplotlib.pyplot as plt

        monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
        told: dict[str, Any] = {}
        for cell in cells:
            exec(cell.source, told)
            told |= {key: value for key, value in QUICK.items() if key in told}
    assert len(drawn) == {"erase": 2, "places": 3}[name]
    plt.close("all")
