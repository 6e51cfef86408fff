"""From prompts to what a denoiser is told: text encoders, and the conditioning that they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

T5_TOKENS = 256  # the pipelines' default


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about N prompts: named tensors, each (N, ...).

    Which names there are is the adapter's business ("states"; "pooled" and "time_ids" for XL).
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """The prompts of a slice or of a (M,) int64 tensor, in that order."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, n: int) -> Conditioning:
        """One prompt for n images, without copying: (1, ...) -> (n, ...)."""
        return Conditioning(
            {name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Prompts of several conditionings one after another: (N_1 + N_2 + ..., ...)."""
        names = parts[0].tensors
        return Conditioning({name: torch.cat([p.tensors[name] for p in parts]) for name in names})


class TextEncoder:
    """One of a pipeline's text encoders with its tokenizer."""

    def __init__(self, pipeline: Any, suffix: str) -> None:
        """`suffix` ends its names in the pipeline: "", "_2" or "_3"."""
        self.suffix = suffix
        self.tokenizer = getattr(pipeline, f"tokenizer{suffix}")
        self.network = getattr(pipeline, f"text_encoder{suffix}").eval().requires_grad_(False)
        # Positions, with the tokens that start and end a text; T5 has no end of them.
        positions = getattr(self.network.config, "max_position_embeddings", T5_TOKENS)
        self.max_tokens = int(positions)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, not cut, with those that start and end it."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """(N, L) int64, each prompt padded or cut to L = max_tokens."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids
        return ids


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module is on the device inside the block; then it is as it was, without a copy back."""
    tensors = [*module.parameters(), *module.buffers()]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data
