"""The model card beside the shipped weights, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cad.files import write_atomically
from experiments.miniature.captions import STYLES, SUBJECTS

CONTENTS = {
    "pipeline": "the diffusion model",
    "clip": "CLIP score, zero-shot style accuracy",
    "classifier": "accuracy (ResNet-50's part), features for FID",
    "references.safetensors": "latents of five held-out photographs a subject (Eq. 5)",
    "features.safetensors": "feature statistics of the held-out photographs (FID)",
}


def write_card(weights: Path) -> None:
    """Write weights/README.md from evaluation.json, training.json and the files' sizes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template("card.md.j2").render(
        measured=_read(weights / "evaluation.json"),
        training=_read(weights / "training.json"),
        unet=_read(weights / "pipeline" / "unet" / "config.json"),
        vae=_read(weights / "pipeline" / "vae" / "config.json"),
        subjects=SUBJECTS,
        styles=STYLES,
        contents=CONTENTS,
        megabytes={name: _megabytes(weights / name) for name in CONTENTS},
    )
    write_atomically(weights / "README.md", card.encode())


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _megabytes(path: Path) -> float:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6
