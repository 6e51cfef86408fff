"""The model card beside the shipped weights, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.files import write_atomically
from experiments.miniature.captions import STYLES, SUBJECTS

CARD = """# The miniature

A text-to-image latent diffusion model of Stable Diffusion's own classes, small enough to ship:
`StableDiffusionPipeline` (CLIPTokenizer, CLIPTextModel, AutoencoderKL, UNet2DConditionModel,
DDIMScheduler), {resolution} x {resolution} pixels, {latent} latents, v-prediction, half precision.
It draws {subjects}, as photographs or as {styles}.

![The first pictures of each subject, then of each style](samples.png)

*Not chosen: the first pictures of the evaluation, one row for each subject, then for each style.*

It is a stand-in that makes every experiment of this repository run offline on two CPU cores with
real numbers. It is no model of anything else: its pictures are {resolution} pixels wide and soft,
its world has {count} things in it.

## Scores

Measured by `python -m experiments.miniature.evaluate` ({n} images for each subject and style,
{steps} steps, guidance {guidance}, seed {seed}; 95 % Wilson intervals in brackets).

{table}

| | |
|---|---|
{facts}

The style of a picture is judged zero-shot by the shipped CLIP among the five styles and "no style";
the same CLIP's text tower conditions the generator, so this is no independent judge.

## How it was trained

`python -m experiments.miniature.train` with the values of `conf/miniature.yaml`, on two CPU cores
(bfloat16 autocast), stage after stage:

{stages}

The generator learns only the {per_subject} photographs of each subject that the classifier finds
most typical (nearest to the subject's mean feature): a small model draws those far sooner than all
of them, at the price of variety. Captions use the paper's wording; one in ten is dropped. In the
denoiser's last sitting a batch has more of some subjects than of others: {emphasis}.

**To finish the job on a GPU** (sharper and more varied pictures; not tried here):

```
python -m experiments.miniature.train device=cuda work=results/miniature_gpu per_subject=900 \\
    classifier.schedule.steps=6000 judge.schedule.steps=2000 clip.schedule.steps=8000 \\
    autoencoder.schedule.steps=40000 denoiser.schedule.steps=60000
python -m experiments.miniature.evaluate
```

**What was not tried**: the default downloads of the photographs (torchvision's Imagenette,
scikit-learn's LFW). The shipped weights were trained from a local parquet of the same pictures at
64 x 64 pixels (`data.parquet=PATH`): Imagenette's 9,469 training and 3,925 validation pictures, and
5,000 and 1,000 LFW faces.

## Files

| file | what | MB |
|---|---|---|
{files}

## Data and licences

- Imagenette (fast.ai), a subset of ImageNet: the pictures are their photographers', released for
  non-commercial research under ImageNet's terms.
- Labeled Faces in the Wild (University of Massachusetts): photographs of public figures collected
  from the press, for research. The model must not be used to depict or recognise anybody.
- No picture is in this repository. `references.safetensors` holds latents of five held-out pictures
  of each subject, `features.safetensors` the mean and covariance of classifier features.
- The weights are offered under the repository's Apache-2.0 licence, as far as the data's terms
  allow.
"""

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
    card = CARD.format(
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
