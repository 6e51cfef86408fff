"""A CLIP in a local folder: transformers' CLIPModel, CLIPTokenizer and image normalisation.

The folder is what `save_pretrained` of the three writes; of the preprocessor only image_mean and
image_std are used, and images of another size are resized to the model's (bicubic, antialiased).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from cad.errors import UserError
from cad.models.base import resolve_device
from evaluation.evaluators.pixels import to_channels_first
from evaluation.evaluators.weights import SHORT, file_digest

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


class ClipFolder:
    """Embeds images and texts as unit vectors (N, D) float32 on the CPU.

    `version` holds the start of the SHA-256 over the folder's weights. Raises UserError if the
    folder lacks a file or its tokenizer has no vocabulary.
    """

    def __init__(self, folder: str | Path, device: str) -> None:
        folder = Path(folder)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(f"CLIP folder {folder} has no {', '.join(missing)}")
        self._device = resolve_device(device)
        self._model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self._model.eval().requires_grad_(False).to(self._device)
        config: Any = self._model.config
        self._image_size = int(config.vision_config.image_size)
        self._longest = int(config.text_config.max_position_embeddings)
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if len(self._tokenizer) < config.text_config.vocab_size:
            raise UserError(f"CLIP folder {folder}: its tokenizer does not fit its text encoder")
        preprocessor = json.loads((folder / FILES[2]).read_text(encoding="utf-8"))
        self._mean = torch.tensor(preprocessor["image_mean"], device=self._device).view(3, 1, 1)
        self._std = torch.tensor(preprocessor["image_std"], device=self._device).view(3, 1, 1)
        self.logit_scale = float(self._model.logit_scale.exp())
        self.version = f"clip-{file_digest(folder / FILES[1])[:SHORT]}"

    @torch.no_grad()
    def embed_images(self, images: NDArray[np.uint8]) -> Tensor:
        """(N, D) of uint8 (N, H, W, 3) RGB."""
        x = to_channels_first(images).to(self._device).float() / 255  # (N, 3, H, W)
        size = self._image_size
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        output = self._model.get_image_features((x - self._mean) / self._std)
        return F.normalize(output.pooler_output, dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D). Raises UserError for a text that is longer than the encoder takes."""
        longest = self._longest
        tokens = self._tokenizer(list(texts), padding="max_length", max_length=longest)
        for text, ids in zip(texts, tokens["input_ids"], strict=True):
            if len(ids) > longest:
                raise UserError(f"CLIP takes {longest} tokens, {len(ids)} in {text!r}")
        ids = torch.tensor(tokens["input_ids"], device=self._device)  # (N, longest)
        mask = torch.tensor(tokens["attention_mask"], device=self._device)
        output = self._model.get_text_features(input_ids=ids, attention_mask=mask)
        return F.normalize(output.pooler_output, dim=1).cpu()
