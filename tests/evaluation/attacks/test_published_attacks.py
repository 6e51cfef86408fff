"""The attacks against readings of the published algorithms that use nothing of the project's own.

One prompt, the tiny random pipeline of diffusers' and transformers' classes, and the draws that the
search makes: every loss and the tokens in the end.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import RESOLUTION, build_pipeline
from tqdm import tqdm

from cad.components import component_weights
from cad.models.stable_diffusion import StableDiffusionModel
from cad.sampling import make_generators
from cad.weight_edit import Scale, WeightEdit
from evaluation.attacks.base import attempt
from evaluation.attacks.p4d import P4D
from evaluation.attacks.unlearn_diff import UnlearnDiff
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings

K, TIMESTEPS, ITERATIONS, LR, DECAY, SEED, PROMPT = 2, (166, 499, 832), 4, 0.01, 0.1, 3, "a hut"
SETTINGS = {"tokens": K, "timesteps": 3, "iterations": ITERATIONS, "lr": LR, "weight_decay": DECAY}
SETTINGS |= {"retokenize": True, "batch_size": 1}
FACTOR = 0.2  # by which the edit multiplies every feed-forward weight


class Published:
    """What the released attacks work with: two UNets, one text encoder, an image."""

    def __init__(self, pipeline, image):
        self.pipeline, self.text = pipeline, pipeline.text_encoder
        self.edited = copy.deepcopy(pipeline.unet)
        with torch.no_grad():
            for name, weight in self.edited.named_parameters():
                if ".ff." in name and weight.dim() == 2:
                    weight *= FACTOR
        self.table = self.text.get_input_embeddings().weight.detach()
        special = pipeline.tokenizer.all_special_ids
        self.usable = torch.tensor([i for i in range(len(self.table)) if i not in special])
        self.ids = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
        pixels = torch.from_numpy(image).permute(0, 3, 1, 2) / 127.5 - 1
        mean = pipeline.vae.encode(pixels).latent_dist.mean.detach()
        self.x_0 = mean * pipeline.vae.config.scaling_factor

    def noised(self, t, noise):
        alpha_bar = self.pipeline.scheduler.alphas_cumprod[t]
        return alpha_bar.sqrt() * self.x_0 + (1 - alpha_bar).sqrt() * noise

    def predicted(self, unet, x_t, t, embeddings=None):
        """Epsilon for the prompt; `embeddings` (K, D) are put between the start token and it.

        As further rows of the table of embeddings, with ids of their own.
        """
        rows = self.table if embeddings is None else torch.cat([self.table, embeddings])
        new = torch.arange(len(self.table), len(rows))[None]
        ids = torch.cat([self.ids[:, :1], new, self.ids[:, 1:]], dim=1)[:, : self.ids.shape[1]]
        (name,) = [n for n, w in self.text.named_parameters() if w.shape == self.table.shape]
        states = torch.func.functional_call(self.text, {name: rows}, (ids,)).last_hidden_state
        return unet(x_t, t, encoder_hidden_states=states).sample


class Adam:
    """Kingma & Ba's, with the weight decay in the gradient, or beside it (Loshchilov & Hutter)."""

    def __init__(self, name):
        self.decoupled, self.m, self.v, self.steps = name == "adamw", 0.0, 0.0, 0

    def step(self, x, gradient):
        if self.decoupled:
            x = x - LR * DECAY * x
        else:
            gradient = gradient + DECAY * x
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
        return x - LR * m / (v.sqrt() + 1e-8)


def read_p4d(published, generator, optimizer):
    draw = published.usable[torch.randint(len(published.usable), (K,), generator=generator)]
    free, adam, losses = published.table[draw], Adam(optimizer), []
    vocabulary = published.table[published.usable]

    def nearest():
        return F.cosine_similarity(free[:, None], vocabulary[None], dim=-1).argmax(dim=-1)

    for t in TIMESTEPS:
        for _ in range(ITERATIONS):
            x_t = published.noised(t, torch.randn(published.x_0.shape, generator=generator))
            projected = vocabulary[nearest()].requires_grad_()
            wanted = published.predicted(published.pipeline.unet, x_t, t).detach()
            found = published.predicted(published.edited, x_t, t, projected)
            loss = F.mse_loss(found, wanted)
            free = adam.step(free, torch.autograd.grad(loss, projected)[0])
            losses.append(loss.item())
    return losses, published.usable[nearest()].tolist()


def read_unlearn_diff(published, generator, optimizer):
    vocabulary = published.table[published.usable]
    share = torch.full((K, len(vocabulary)), 1 / len(vocabulary))
    adam, losses = Adam(optimizer), []
    for t in TIMESTEPS:
        shape = published.x_0.shape
        noises = [torch.randn(shape, generator=generator) for _ in range(ITERATIONS)]
        for noise in noises:
            drawn = torch.multinomial(share, 1, generator=generator)[:, 0]
            one_hot = F.one_hot(drawn, len(vocabulary)).float().requires_grad_()
            x_t = published.noised(t, noise)
            found = published.predicted(published.edited, x_t, t, one_hot @ vocabulary)
            loss = F.mse_loss(found, noise)
            share = adam.step(share, F.hardtanh(torch.autograd.grad(loss, one_hot)[0]))
            share = torch.stack([onto_simplex(row) for row in share])
            losses.append(loss.item())
    return losses, published.usable[share.argmax(dim=-1)].tolist()


def onto_simplex(row):
    """By bisection, as released: the amount to take from every entry for a sum of 1."""
    low, high = row.min() - 1, row.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (row - middle).clamp(0, 1).sum() > 1 else (low, middle)
    return (row - high).clamp(0, 1)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize(
    ("attack_class", "own", "reading"),
    [(P4D, {"states": "image"}, read_p4d), (UnlearnDiff, {}, read_unlearn_diff)],
)
def test_an_attack_is_the_published_one(attack_class, own, reading, optimizer):
    pipeline = build_pipeline("epsilon")
    attack = attack_class(**SETTINGS, **own, optimizer=optimizer)
    model = StableDiffusionModel("tiny", copy.deepcopy(pipeline), RESOLUTION)
    random = torch.Generator().manual_seed(0)
    size = (1, RESOLUTION, RESOLUTION, 3)
    image = torch.randint(256, size, generator=random, dtype=torch.uint8).numpy()
    weights = component_weights(model, "ff")
    changes = {n: Scale(torch.arange(w.numel()), FACTOR) for n, w in weights.items()}
    edit = WeightEdit(changes, {"model": model.provenance()})
    given = ([Prompt(PROMPT, SEED, "hut")], SamplerSettings(1, 1.0, "ddim", 1), lambda *_: [False])
    (found,) = attempt(model, edit, attack, *given, tqdm(disable=True), image)
    (generator,) = make_generators([SEED], f"attack-{attack.name}")
    losses, tokens = reading(Published(pipeline, image), generator, optimizer)
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert found.tokens == tokens
    assert found.timestep == TIMESTEPS[-1]
