"""What an outside judge makes of the denoiser in training.

    python -m experiments.miniature.progress progress.judge=FILE

Draws from the newest checkpoint's averaged weights, with the finished autoencoder, and asks a
published classifier that took no part in the training. Adds a row for each guidance weight to
work/progress.csv and a contact sheet beside it. Needs `pip install ai-edge-litert`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
import pandas as pd
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import DictConfig
from safetensors import safe_open

from cad.errors import UserError
from cad.models.stable_diffusion import StableDiffusionModel
from evaluation.generation import generate
from evaluation.prompts import ObjectPrompts
from evaluation.sampler import SamplerSettings
from experiments.miniature.data import SIZE
from experiments.miniature.denoiser import build_denoiser
from experiments.miniature.export import PROGRESS, assemble
from experiments.miniature.judging import OBJECTS, by_group, first, outside, read, write_sheet
from experiments.miniature.train import open_workshop
from experiments.run.command_line import exit_status

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="programs/miniature")
def main(config: DictConfig) -> None:
    show(config)


def show(config: DictConfig) -> None:
    """Add a row of progress.csv and a sheet for each guidance weight."""
    settings, workshop = config.progress, open_workshop(config)
    done = [each for each in ("decoder", "autoencoder") if each in workshop.reported()]
    if not done:
        raise UserError("progress needs the stages clip and autoencoder first")
    judges = outside(settings.judge)
    name = "decay" if settings.decayed else "checkpoint"
    latent_channels = AutoencoderKL.load_config(workshop.stage("autoencoder"))["latent_channels"]
    size = SIZE // 2 ** (len(config.autoencoder.channels) - 1)
    asked, width = config.denoiser, config.clip.text.hidden_size
    channels = asked.channels, asked.heads, asked.groups
    unet = build_denoiser(latent_channels, size, *channels, width)
    steps = load_average(unet, workshop.stage("denoiser") / f"{name}.safetensors")
    pictures = steps * config.denoiser.schedule.batch_size
    pipeline = assemble(workshop, unet, done[0]).to(workshop.device, torch.float32)
    model = StableDiffusionModel("miniature", pipeline, SIZE)
    prompts = ObjectPrompts(OBJECTS, settings.per_subject, seed=0).build()
    folder = workshop.stage("progress")
    for guidance in settings.guidance:
        sampler = SamplerSettings(settings.steps, guidance, "default", 2 * len(OBJECTS))
        images = generate(model, prompts, sampler, folder)
        sheet = folder / f"{pictures:08d}_{name}_{guidance:g}.png"
        write_sheet(sheet, first(read(OBJECTS, images)))
        told = {key: by_group(judge, images) for key, judge in judges.items()}
        row = {"pictures": pictures, "weights": name, "guidance": guidance, "n": len(images)}
        row |= {"top1": told["top1"]["mean"]["value"]}
        row |= {group: cell["value"] for group, cell in told["among_ten"].items()}
        path = workshop.folder / PROGRESS
        pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)
        log.info("%s", row)


def load_average(network: UNet2DConditionModel, checkpoint: Path) -> int:
    """Load a training checkpoint's averaged weights; the steps behind them."""
    if not checkpoint.is_file():
        raise UserError(f"no {checkpoint}: the denoiser has no checkpoint yet")
    prefix = "average.module."
    with safe_open(checkpoint, framework="pt") as file:
        names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        network.load_state_dict({key.removeprefix(prefix): file.get_tensor(key) for key in names})
        return int(file.metadata()["step"])


if __name__ == "__main__":
    sys.exit(exit_status(main))
