"""The model card beside the shipped weights, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from cad.files import write_atomically
from experiments.miniature.captions import STYLES, SUBJECTS

TEMPLATE = Path(__file__).with_name("card.md")
WHAT = {
    "pipeline": "the diffusion model",
    "clip": "CLIP score, zero-shot style accuracy",
    "classifier": "accuracy (ResNet-50's part), features for FID",
    "references.safetensors": "latents of five held-out photographs a subject (Eq. 5)",
    "features.safetensors": "feature statistics of the held-out photographs (FID)",
}


def write_card(weights: Path) -> None:
    """Write weights/README.md from evaluation.json, training.json and the files' sizes."""
    measured = _read(weights / "evaluation.json")
    training = _read(weights / "training.json")
    unet = _read(weights / "pipeline" / "unet" / "config.json")
    vae = _read(weights / "pipeline" / "vae" / "config.json")
    card = TEMPLATE.read_text(encoding="utf-8").format(
        resolution=vae["sample_size"],
        latent=f"{unet['sample_size']} x {unet['sample_size']} x {unet['in_channels']}",
        subjects=_listed(list(SUBJECTS.values())),
        styles=_listed(list(STYLES.values())),
        count=len(SUBJECTS),
        n=measured["images_per_class"],
        steps=measured["sampler"]["steps"],
        guidance=measured["sampler"]["guidance"],
        seed=measured["seed"],
        table=_scores(measured),
        facts=_facts(measured, training),
        stages=_stages(training),
        emphasis=_emphasis(training["denoiser"]["settings"]["emphasis"]),
        per_subject=training["latents"]["settings"]["per_subject"],
        files=_files(weights),
    )
    write_atomically(weights / "README.md", card.encode())


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]


def _percent(cell: dict[str, float]) -> str:
    return f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"


def _emphasis(times: dict[str, int]) -> str:
    return ", ".join(f"{SUBJECTS[name]} {count} times" for name, count in times.items()) or "none"


def _scores(measured: dict[str, Any]) -> str:
    rows = []
    for kind, metric in (("subject", "accuracy"), ("style", "style_accuracy")):
        for name, cell in measured[metric].items():
            label = f"**{kind}s, mean**" if name == "mean" else name
            rows.append({"prompt": label, "recognised as such, %": _percent(cell)})
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _facts(measured: dict[str, Any], training: dict[str, Any]) -> str:
    facts = {
        'NudeNet sees a face in "a photo of a face", %': _percent(measured["nudenet_face"]),
        "plain pictures seen as in no drawn style, %": _percent(measured["no_style"]),
    }
    if "classifier_validation" in measured:
        name = "classifier on held-out photographs, top-1 %"
        facts[name] = _percent(measured["classifier_validation"])
    facts["CLIP on held-out photographs, subject, zero-shot %"] = (
        f"{100 * training['clip']['subject_accuracy']:.1f}"
    )
    facts["CLIP on held-out photographs, style, zero-shot %"] = (
        f"{100 * training['clip']['style_accuracy']:.1f}"
    )
    facts["autoencoder on held-out photographs, PSNR dB"] = f"{training['autoencoder']['psnr']:.1f}"
    speed = f"images per second, CPU, {measured['threads']} threads"
    facts[speed] = f"{measured['images_per_second']:.1f}"
    return "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def _stages(training: dict[str, Any]) -> str:
    rows = [
        {
            "stage": name,
            "steps": f"{stage['settings']['schedule']['steps']:,}",
            "batch": stage["settings"]["schedule"]["batch_size"],
            "sittings (from step, planned to step)": ", ".join(
                f"{sitting['from_step']:,} to {sitting['to_step']:,}"
                for sitting in stage["sittings"]
            ),
        }
        for name, stage in training.items()
        if "schedule" in stage["settings"]
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _files(weights: Path) -> str:
    lines, total = [], 0
    for name, what in WHAT.items():
        path = weights / name
        parts = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
        size = sum(part.stat().st_size for part in parts)
        total += size
        lines.append(f"| `{name}` | {what} | {size / 1e6:.1f} |")
    return "\n".join([*lines, f"| all | | {total / 1e6:.1f} |"])
