"""CLIP score: how well an image fits its prompt.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning" (2021), as the
paper's Tables 2, 9 and 13 report it. Deviations from Hessel: 100 x cosine instead of 2.5 x, and
negative cosines are kept, so that the mean is unbiased.
"""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from cad.checks import check, one_of
from cad.errors import UserError
from cad.files import content_digest
from cad.identity import immaterial
from cad.models.base import resolve_device
from evaluation.evaluators.base import (
    GENERAL,
    Download,
    Evaluator,
    Instrument,
    Metric,
    Record,
    label_of,
    to_channels_first,
)
from evaluation.pixels import Pixels, require_uint8
from evaluation.prompts import Prompt

# OpenAI trained with QuickGELU; plain "ViT-B-32" would be another model.
MODEL = "ViT-B-32-quickgelu"
WEIGHTS = {
    "openai": Download(
        what="OpenAI's CLIP ViT-B/32",
        metric="clip_score",
        url="https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        digest="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        size_mb=338,
        instead="take the hub's copy of it: model.clip_embedder.weights=hub",
    ),
    "hub": Download(
        what="the hub's copy of OpenAI's CLIP ViT-B/32",
        metric="clip_score",
        url="https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/"
        "a6f597a30f7b82c51704746581f9a4e41421e878/open_clip_model.safetensors",
        digest="e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
        size_mb=605,
        instead="take OpenAI's own file: model.clip_embedder.weights=openai",
        saved_as="ViT-B-32-openai-hub.safetensors",
    ),
}


class Embedder(Instrument):
    """Maps images and texts to unit vectors (N, D), float32 on the CPU, of one space."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """The factor of cosines that the network was trained with."""

    @abstractmethod
    def embed_images(self, images: Pixels) -> Tensor:
        """(N, D) of uint8 (N, H, W, 3) RGB."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D). Texts that are too long are cut or refused with UserError."""

    def check(self, texts: Sequence[str]) -> None:
        """Raise UserError for a text that `embed_texts` would refuse."""
        return None


@dataclass(frozen=True)
class ClipScore(Evaluator):
    """100 x cosine of image and prompt, mean over images. Records: cosine.

    About 31 for Stable Diffusion on COCO captions (paper Table 2), and on a scale of its own for
    every CLIP: compare scores of one version only.
    """

    name: ClassVar[str] = "clip_score"
    unit: ClassVar[str] = "100 x cosine"
    higher_is_better: ClassVar[bool] = True
    decimals: ClassVar[int] = 2
    measures: ClassVar[str] = GENERAL

    clip: Embedder

    @property
    def instrument(self) -> str:
        return self.clip.label

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.clip.load()
        self.clip.check(list(dict.fromkeys(prompt.text for prompt in prompts)))

    def score(
        self, images: Pixels, prompts: Sequence[Prompt], references: Pixels | None = None
    ) -> list[Record]:
        require_uint8(images)
        distinct = list(dict.fromkeys(prompt.text for prompt in prompts))
        texts = self.clip.embed_texts(distinct)  # (distinct, D)
        texts = texts[[distinct.index(prompt.text) for prompt in prompts]]  # (N, D)
        cosines = (self.clip.embed_images(images) * texts).sum(dim=1)  # (N,)
        return [{"cosine": round(cosine, 6)} for cosine in cosines.tolist()]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        return self.mean(records, "cosine", scale=100)


@dataclass(frozen=True)
class OpenClipEmbedder(Embedder):
    """OpenAI's ViT-B/32 in open_clip, its own image transform; texts are cut at 77 tokens.

    `weights` is one of WEIGHTS: OpenAI's published file, or the hub's copy in float32, should that
    go away; downloaded once to torch's cache. open_clip cleans texts as OpenAI does (ftfy, HTML's
    entities); transformers, which conditions the images, does not. float32.
    """

    libraries = ("open_clip_torch",)

    weights: str
    device: str = immaterial()

    def __post_init__(self) -> None:
        check(self, "model.clip_embedder", weights=one_of(WEIGHTS))

    @property
    def label(self) -> str:
        return f"open_clip-{open_clip.__version__}/{MODEL}/openai-{WEIGHTS[self.weights].label}"

    @cached_property
    def network(self) -> tuple[Any, Any]:
        """The network, and its transform of images."""
        path = WEIGHTS[self.weights].fetch()
        with warnings.catch_warnings():
            # OpenAI's file is a TorchScript archive: torch.load hands it on to torch.jit, and says
            # so. Its hash was checked, so it may be unpickled.
            warnings.simplefilter("ignore")
            model, _, transform = open_clip.create_model_and_transforms(
                MODEL, pretrained=str(path), weights_only=False
            )
        return model.eval().requires_grad_(False).to(resolve_device(self.device)), transform

    @property
    def logit_scale(self) -> float:
        return float(self.network[0].logit_scale.exp())

    @torch.no_grad()
    def embed_images(self, images: Pixels) -> Tensor:
        model, transform = self.network
        x = torch.stack([transform(Image.fromarray(image)) for image in images])
        embedded = model.encode_image(x.to(resolve_device(self.device)))  # (N, 512)
        return F.normalize(embedded.float(), dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        model, _ = self.network
        tokens = open_clip.get_tokenizer(MODEL)(list(texts))  # (N, 77)
        embedded = model.encode_text(tokens.to(resolve_device(self.device)))
        return F.normalize(embedded.float(), dim=1).cpu()


@dataclass(frozen=True)
class ClipFolder(Embedder):
    """The CLIP in a local folder, as transformers' `save_pretrained` writes it: the miniature's.

    Of the image processor's only image_mean and image_std are used; images of another size are
    resized to the model's (bicubic, antialiased). Longer texts than it takes are refused, not cut:
    the model that draws the image could not read the rest either.
    """

    folder: str
    device: str = immaterial()

    @property
    def label(self) -> str:
        return label_of("clip", Path(self.folder) / "model.safetensors")

    def settings(self) -> dict[str, Any]:
        """The folder's content, tokenizer and all, wherever it lies. UserError if it is none."""
        if not (Path(self.folder) / "config.json").is_file():  # of another, nothing is read
            raise UserError(
                f"model.clip.folder={self.folder} holds no CLIP: config.json is missing"
            )
        return {"folder": content_digest(Path(self.folder))}

    @cached_property
    def network(self) -> tuple[Any, Any, Tensor]:
        """The network, its tokenizer, and the channels' means and deviations (2, 3, 1, 1)."""
        folder, device = Path(self.folder), resolve_device(self.device)
        try:
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            images = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            if len(tokenizer) < model.config.text_config.vocab_size:
                raise ValueError("its tokenizer does not fit its text encoder")
            scale = torch.tensor([images["image_mean"], images["image_std"]]).view(2, 3, 1, 1)
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(
                f"the CLIP folder {folder} does not load: {error!r}; model.clip.folder names it"
            ) from error
        return model.eval().requires_grad_(False).to(device), tokenizer, scale.to(device)

    @property
    def logit_scale(self) -> float:
        return float(self.network[0].logit_scale.exp())

    @torch.no_grad()
    def embed_images(self, images: Pixels) -> Tensor:
        model, _, (mean, std) = self.network
        x = to_channels_first(images).to(resolve_device(self.device)).float() / 255  # (N, 3, H, W)
        size = int(model.config.vision_config.image_size)
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        output = model.get_image_features((x - mean) / std)
        return F.normalize(output.pooler_output, dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokens(texts).to(resolve_device(self.device))
        output = self.network[0].get_text_features(**tokens)
        return F.normalize(output.pooler_output, dim=1).cpu()

    def check(self, texts: Sequence[str]) -> None:
        self._tokens(texts)

    def _tokens(self, texts: Sequence[str]) -> Any:
        """Ids and attention mask, each (N, L). UserError for a text that is longer than L."""
        model, tokenizer, _ = self.network
        longest = int(model.config.text_config.max_position_embeddings)  # L
        tokens = tokenizer(list(texts), padding="max_length", max_length=longest)
        for text, ids in zip(texts, tokens["input_ids"], strict=True):
            if len(ids) > longest:
                raise UserError(f"CLIP takes {longest} tokens, {len(ids)} in {text!r}")
        return tokens.convert_to_tensors("pt")
