"""A diffusion model of a few hundred weights behind the real interface, for tests of generation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from cad.errors import UserError
from cad.models.base import DiffusionModel, Origin
from cad.models.conditioning import Conditioning
from cad.models.sampler import Sampler
from cad.weight_edit import WeightEdit, Zero
from evaluation.image_sets import ImageSet


class ToyDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(4, 16, 3, padding=1)
        self.text = nn.Linear(8, 16)
        self.exit = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x_t: Tensor, states: Tensor) -> Tensor:
        hidden = torch.tanh(self.entry(x_t) + self.text(states)[:, :, None, None])
        return self.exit(hidden)  # (N, 4, h, w)


class ToyModel(DiffusionModel):
    """Epsilon prediction on (4, 8, 8) latents, 16 x 16 pixels; counts how prompts are encoded."""

    components: ClassVar[dict[str, str]] = {"ff": r"text\.weight"}
    prediction_type = "epsilon"

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__("toy", ToyDenoiser(), 16, (4, 8, 8), Origin("toy", "local"))
        self.encoded: Counter[str] = Counter()
        self.scheduler_config = {"num_train_timesteps": 100}

    def surroundings_digest(self) -> str:
        return hashlib.sha256(str(self.scheduler_config).encode()).hexdigest()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if len(prompt) > 100:
                raise UserError(f"the prompt {prompt!r} is too long")

    def encode_prompts(
        self, prompts: Sequence[str], *, truncate: bool = False, apart: bool = False
    ) -> Conditioning:
        self.encoded.update(prompts)
        rows = []
        for text in prompts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            rows.append(torch.randn(8, generator=torch.Generator().manual_seed(seed)))
        return Conditioning({"states": torch.stack(rows)})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(x_t, conditioning.tensors["states"])

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return DDIMScheduler(**self.scheduler_config).add_noise(x_0, noise, t)

    def sampler(self, steps: int, kind: str = "default", eta: float | None = 0.0) -> Sampler:
        return Sampler(DDIMScheduler(**self.scheduler_config), steps, self.device, eta)

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def decode_latents(self, x_0: Tensor) -> Tensor:
        return x_0[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).sigmoid()


def knock_out(model: DiffusionModel, count: int = 8) -> WeightEdit:
    """An edit that zeroes the first `count` text weights."""
    change = Zero(torch.arange(count))
    return WeightEdit({"text.weight": change}, {"model": model.provenance()})


@dataclass(frozen=True)
class ToyPretrained:
    """Loads the toy model in any process, as `cad.models.pretrained.Pretrained` loads real ones."""

    seed: int = 0

    def load(self, device: str | None = None) -> ToyModel:
        return ToyModel(self.seed)


def contents(images: ImageSet) -> dict[str, bytes]:
    """The files of a set, by name."""
    return {path.name: path.read_bytes() for path in sorted(images.folder.iterdir())}
