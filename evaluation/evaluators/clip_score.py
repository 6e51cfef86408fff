"""CLIP score: how well an image fits its prompt.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning" (2021), as the
paper's Tables 2, 9 and 13 report it: 100 x cosine of the two embeddings, mean over images.
Deviations from Hessel: no factor 2.5 and negative cosines are kept, so that the mean is unbiased.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cad.models.base import resolve_device
from evaluation.evaluators.base import GENERAL, Evaluator, Metric, Record, require_uint8
from evaluation.evaluators.clip_folder import ClipFolder
from evaluation.evaluators.weights import Download
from evaluation.prompts import Prompt
from evaluation.statistics import Interval, bootstrap_mean

MODEL = (
    "ViT-B-32-quickgelu"  # OpenAI trained with QuickGELU; plain "ViT-B-32" would be another model
)
WEIGHTS = Download(
    what="OpenAI's CLIP ViT-B/32",
    url="https://openaipublic.azureedge.net/clip/models/"
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    digest="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    size_mb=338,
)
BOOTSTRAP_SEED = 0


class Embedder(ABC):
    """Maps images and texts to unit vectors (N, D), float32 on the CPU, of one space."""

    version: str

    @abstractmethod
    def embed_images(self, images: NDArray[np.uint8]) -> Tensor:
        """(N, D) of uint8 (N, H, W, 3) RGB."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D). Texts that are too long are cut or refused with UserError."""

    def check(self, texts: Sequence[str]) -> None:
        """Raise UserError for a text that `embed_texts` would refuse."""
        return None


class ClipScore(Evaluator):
    """100 x cosine of image and prompt, mean over images, with its bootstrap interval.

    Higher is better; about 31 for Stable Diffusion on COCO captions (paper Table 2), and on a scale
    of its own for every CLIP: compare scores of one version only. Records: cosine.
    """

    name: ClassVar[str] = "clip_score"
    unit: ClassVar[str] = "100 x cosine"
    higher_is_better: ClassVar[bool] = True
    decimals: ClassVar[int] = 2
    measures: ClassVar[str] = GENERAL

    def __init__(self, clip: Embedder) -> None:
        self._clip = clip
        self.version = clip.version

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._clip.check(list(dict.fromkeys(prompt.text for prompt in prompts)))

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        references: NDArray[np.uint8] | None = None,
    ) -> list[Record]:
        require_uint8(images)
        distinct = list(dict.fromkeys(prompt.text for prompt in prompts))
        texts = self._clip.embed_texts(distinct)  # (distinct, D)
        texts = texts[[distinct.index(prompt.text) for prompt in prompts]]  # (N, D)
        cosines = (self._clip.embed_images(images) * texts).sum(dim=1)  # (N,)
        return [{"cosine": round(cosine, 6)} for cosine in cosines.tolist()]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        self.require(records)
        mean = bootstrap_mean([record["cosine"] for record in records], BOOTSTRAP_SEED)
        return self.metric(Interval(*(100 * bound for bound in mean)), len(records))


class FolderEmbedder(Embedder):
    """The CLIP of a local folder (`clip_folder`): the miniature's own.

    Longer prompts than it takes are refused, not cut: it has the miniature's tokenizer, so the
    model that draws the image could not read the rest either.
    """

    def __init__(self, folder: str | Path, device: str) -> None:
        self._clip = ClipFolder(folder, device)
        self.version = self._clip.version

    def embed_images(self, images: NDArray[np.uint8]) -> Tensor:
        return self._clip.embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._clip.embed_texts(texts)

    def check(self, texts: Sequence[str]) -> None:
        self._clip.embed_texts(texts)  # the encoder is tiny; its tokenizer is what refuses


class OpenClipEmbedder(Embedder):
    """OpenAI's ViT-B/32 in open_clip, its own image transform; texts are cut at 77 tokens.

    Cutting keeps the first 76 tokens and the end mark, as open_clip's tokenizer does. The weights
    are OpenAI's published file, downloaded once to torch's cache. float32.
    """

    def __init__(self, device: str) -> None:
        path = WEIGHTS.fetch(
            "evaluator=clip_score", "use model=mini, which has its own CLIP and needs no download"
        )
        self._device = resolve_device(device)
        with warnings.catch_warnings():
            # OpenAI's file is a TorchScript archive: torch.load hands it on to torch.jit, and says
            # so. Its hash was checked, so it may be unpickled.
            warnings.filterwarnings("ignore", category=UserWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            model, _, self._transform = open_clip.create_model_and_transforms(
                MODEL, pretrained=str(path), weights_only=False
            )
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._tokenizer = open_clip.get_tokenizer(MODEL)
        self.version = f"open_clip-{open_clip.__version__}/{MODEL}/openai-{WEIGHTS.version}"

    @torch.no_grad()
    def embed_images(self, images: NDArray[np.uint8]) -> Tensor:
        x = torch.stack([self._transform(Image.fromarray(image)) for image in images])
        embedded = self._model.encode_image(x.to(self._device))  # (N, 3, 224, 224) -> (N, 512)
        return F.normalize(embedded.float(), dim=1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(texts)).to(self._device)  # (N, 77)
        return F.normalize(self._model.encode_text(tokens).float(), dim=1).cpu()
