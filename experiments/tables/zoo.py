"""The edits of a model's finished table runs, as small files with an index, to give away.

    python -m experiments.tables.zoo model=mini      (make zoo MODEL=mini)

In results/MODEL/zoo: a file for each edit, index.json with its settings and all that was measured
of it, README.md with the same as a table, and a loader for people without this package. Every edit
is applied once before it is listed; one that is larger than LIMIT is named and left out.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from omegaconf import DictConfig

from cad.errors import UserError
from cad.export import LOADER
from cad.files import file_digest, write_atomically
from cad.models.base import DiffusionModel
from cad.places import REPOSITORY
from cad.weight_edit import NO_EDIT, WeightEdit
from experiments.run.command_line import exit_status
from experiments.run.configuration import compose
from experiments.run.experiment import prepare
from experiments.run.rendering import changes, title, to_markdown
from experiments.run.results import EDIT, read_json, write_json
from experiments.tables.exhibit import MODEL, Exhibit, ListedRun, Table
from experiments.tables.lookup import option_folders
from experiments.tables.pages import render
from experiments.tables.status import find_all

LIMIT = 1_000_000  # bytes of a file
INDEX = "index.json"
DIGITS = 8  # of an edit's fingerprint, in its file's name

log = logging.getLogger(__name__)

Found = dict[str, list[tuple[str, ListedRun]]]
"""By an edit's fingerprint: the places in tables that show it, and their runs."""


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/status")
def main(config: DictConfig) -> None:
    """Write the zoo of the model that was named."""
    if config.get("model") is None:
        raise UserError("name a model: model=mini")
    name, paths = str(config.model.name), config.paths
    found = distinct_edits(find_all(config, Table))
    if not found:
        raise UserError(
            f"{paths.runs} has no finished run of a table of {name}: make one first, for instance "
            f"with python run.py table=table01 model={name}"
        )
    first = next(iter(found.values()))[0][1]  # which runs on the model as it was configured
    source = prepare(compose(first.overrides, folders=option_folders())).model
    place = source.source.repo or os.path.relpath(source.source.path or "", REPOSITORY)
    folder = Path(paths.results) / name / "zoo"
    log.info("%s", write_zoo(folder, found, source.load(), place))


def distinct_edits(exhibits: Iterable[tuple[Exhibit, Sequence[ListedRun]]]) -> Found:
    """The edits of finished runs, each once, in the order of the tables that show them."""
    found: Found = {}
    for exhibit, runs in exhibits:
        for run in (each for each in runs if each.result is not None):
            fingerprint = read_json(run.folder / "metrics.json")["edit"]["fingerprint"]
            where = " ".join(f"{axis}={at}" for axis, at in run.place.items() if axis != MODEL)
            if fingerprint != NO_EDIT:
                found.setdefault(fingerprint, []).append((f"{exhibit.called}: {where}", run))
    return found


def write_zoo(folder: Path, found: Found, model: DiffusionModel, place: str) -> Path:
    """Write the edits that are small enough and fit the model, and the index; returns its README.

    `place` is what diffusers loads the model from. Files of an earlier zoo that are no longer in it
    are deleted.
    """
    listed, left_out = [], []
    whole = sum(weight.numel() for weight in model.denoiser.parameters())
    for shown in found.values():
        entry, path = _describe(shown), shown[0][1].folder / EDIT
        size = path.stat().st_size
        try:
            if size > LIMIT:
                raise UserError(f"{size:,} bytes, more than {LIMIT:,}")
            edit = WeightEdit.load(path)
            with edit.applied(model):
                share = edit.num_weights / whole
        except UserError as error:
            left_out.append({**entry, "why": str(error)})
            continue
        entry |= {"weights": edit.num_weights, "share": share}
        entry |= {"bytes": size, "sha256": file_digest(path)}
        listed.append(entry | {"settings": edit.provenance["settings"]})
        write_atomically(folder / entry["file"], path.read_bytes())
    for path in folder.glob("*.safetensors"):
        if path.name not in {each["file"] for each in listed}:
            path.unlink()
    index = {"model": model.provenance(), "weights": whole, "edits": listed, "left_out": left_out}
    write_json(folder / INDEX, index)
    write_atomically(folder / LOADER.name, LOADER.read_bytes())
    table = to_markdown(pd.DataFrame([_row(each) for each in listed]))
    text = render("zoo.md.j2", **index, place=place, index=INDEX, table=table)
    write_atomically(folder / "README.md", text.encode())
    return folder / "README.md"


def _describe(shown: Sequence[tuple[str, ListedRun]]) -> dict[str, Any]:
    """What the results say of an edit; measured of each result once."""
    results = {run.folder.name: run.folder for _, run in shown}
    read = {name: read_json(path / "metrics.json") for name, path in results.items()}
    metrics = next(iter(read.values()))
    edit, concepts = metrics["edit"], metrics["concepts"]
    commits = [read_json(path / "environment.json")["commit"] for path in results.values()]
    return {
        "file": f"{'+'.join(concepts)}-{edit['name']}-{edit['fingerprint'][:DIGITS]}.safetensors",
        "title": title(metrics),
        "edit": edit["name"],
        "concepts": concepts,
        "shown": [where for where, _ in shown],
        "commits": sorted(set(commits)),
        "changes": list(
            dict.fromkeys(" ".join(c) for m in read.values() for c in changes(m).items())
        ),
        "measured": [
            {"result": name, "seed": each["seed"], **row}
            for name, each in read.items()
            for row in each["metrics"]
            if row["scope"] != "group"
        ],
    }


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    """A line of the README's table."""
    return {
        "edit": entry["title"],
        "in": "; ".join(entry["shown"]),
        "measured": "; ".join(entry["changes"]),
        "weights": f"{entry['weights']:,} ({100 * entry['share']:.2g} %)",
        "file": f"[{entry['file']}]({entry['file']})",
        "kB": f"{entry['bytes'] / 1000:.0f}",
        "SHA-256": f"`{entry['sha256']}`",
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
