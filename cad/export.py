"""An edit as something to give away: python -m cad.export edit.safetensors --model MODEL --out DIR

Writes the edited pipeline in diffusers' layout, or with --edit-only the edit's file and a loader of
a few lines for people without this package; with a model card made of the edit's provenance.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from safetensors import SafetensorError

from cad.errors import UserError
from cad.files import file_digest
from cad.models.base import DTYPES
from cad.weight_edit import WeightEdit

LOADER = Path(__file__).with_name("apply_edit.py")
EDIT = "edit.safetensors"


def export(
    path: Path, out: Path, model: str | None = None, dtype: str | None = None, whole: bool = True
) -> Path:
    """Writes the edit at `path` into the folder `out`, which must be new or empty; returns it.

    `whole`: the edited pipeline of `model`, a hub id or a folder, as `dtype`; by default those that
    the edit was made for. Otherwise the edit alone. Raises UserError for an edit that cannot be
    read, a model that does not load or has other weights, and a folder with files in it.
    """
    edit = WeightEdit.load(path)
    source = model or str(edit.provenance.get("model", {}).get("id", ""))
    card = _card(edit, source, whole, path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already: name a new folder.")
    if whole:
        pipeline = _pipeline(source, model, edit.provenance["model"], dtype)
        edit.apply_for_good(pipeline)
        pipeline.save_pretrained(out)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / EDIT)
    if not whole:
        shutil.copyfile(LOADER, out / LOADER.name)
    (out / "README.md").write_text(card, encoding="utf-8")
    return out


def _pipeline(source: str, model: str | None, made_for: Any, dtype: str | None) -> Any:
    """The unedited pipeline on the CPU. UserError where it cannot be loaded."""
    wanted = DTYPES[dtype or made_for.get("dtype", "float32")]
    options: dict[str, Any] = {} if model else {"revision": made_for.get("revision")}
    try:
        return DiffusionPipeline.from_pretrained(source, dtype=wanted, **options)
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the model {source!r} that the edit was made for does not load ({error}). Name a hub "
            "id or a folder in diffusers' layout: --model experiments/miniature/weights/pipeline."
        ) from error


def _card(edit: WeightEdit, source: str, whole: bool, path: Path) -> str:
    """The model card. UserError for an edit that does not say how it was made."""
    templates = Environment(
        loader=PackageLoader("cad", "."), undefined=StrictUndefined, trim_blocks=True
    )
    changed = [(name, change.kind, change.num_weights) for name, change in edit.changes.items()]
    told = {"source": source, "whole": whole, "sha256": file_digest(path), "changed": changed}
    try:
        template = templates.get_template("model_card.md.j2")
        return template.render(edit=edit, made=edit.provenance, **told)
    except (UndefinedError, TypeError) as error:
        raise UserError(
            f"the edit at {path} does not say how it was made ({error}): give one of a run, "
            "edit.safetensors of a result folder."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cad.export", description=__doc__)
    parser.add_argument("edit", type=Path, help="the edit's file, edit.safetensors of a result")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", help="hub id or folder of the unedited pipeline")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the edit's")
    parser.add_argument("--edit-only", action="store_true", help="no weights but the edit's")
    parser.add_argument("--push", metavar="REPO", help="upload the folder to the hub as USER/NAME")
    given = parser.parse_args(arguments)
    try:
        out = export(given.edit, given.out, given.model, given.dtype, not given.edit_only)
        if given.push:
            HfApi().create_repo(given.push, exist_ok=True)
            HfApi().upload_folder(repo_id=given.push, folder_path=out)
    except (UserError, OSError, HFValidationError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
