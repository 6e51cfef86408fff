"""What all stages share: the work folder with its report, and one resumable training loop."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from cad.checks import check, not_negative, positive, share, whole
from cad.errors import UserError
from cad.files import atomic_path, write_atomically
from cad.identity import short_digest
from experiments.miniature.data import Photographs, load_photographs
from experiments.run.results import read_json

log = logging.getLogger(__name__)

LOG_EVERY = 25  # steps, whose mean loss is one line of loss.jsonl
INPUTS: dict[str, tuple[str, ...]] = {  # the stages whose results a stage starts from
    "selector": (),
    "clip": (),
    "latents": ("selector",),
    "autoencoder": ("latents",),
    "classifier": (),
    "judge": ("classifier",),
    "denoiser": ("clip", "latents"),
    "decoder": ("autoencoder", "denoiser"),
    "vision": ("clip", "decoder"),
    "export": ("judge", "clip", "decoder", "denoiser", "vision"),
}


@dataclass(frozen=True)
class Schedule:
    """How a stage is trained; every value has its reason in conf/programs/miniature.yaml.

    The constant phase has no end of its own: it goes on from its checkpoint for as long as `steps`
    says. The decay begins at the constant phase's last checkpoint, wherever that is, and leaves it
    as it was, so that a finished training can be taken up again.
    """

    steps: int  # of the constant phase, its warm-up included; a checkpoint beyond is taken as it is
    decay: int  # steps of a half cosine to zero behind the constant phase; 0: not yet
    batch_size: int
    lr: float  # of the constant phase, after a linear warm-up
    warmup: int  # steps
    weight_decay: float
    beta2: float  # of AdamW
    ema: float  # decay of the averaged weights, which are the ones that ship
    checkpoint_every: int  # steps
    autocast: bool  # to bfloat16

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("batch_size", "checkpoint_every"), whole(1))
        lengths = dict.fromkeys(("steps", "decay", "warmup"), whole(0))
        check(self, "schedule", **counts, **lengths, lr=positive, ema=share, beta2=share)
        check(self, "schedule", weight_decay=not_negative)


def learning_rate(step: int, schedule: Schedule, decay_from: int | None = None) -> float:
    """Linear warm-up, then constant; a half cosine to zero behind step `decay_from`."""
    rate = schedule.lr * min(1.0, (step + 1) / max(1, schedule.warmup))
    if decay_from is None:
        return rate
    progress = min(1.0, (step - decay_from) / schedule.decay)
    return rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Training:
    """A network in training, `loss_function(random numbers of this step)` its scalar loss.

    Random numbers come from generators seeded by (seed, step), so a training that was stopped and
    taken up at its last checkpoint ends like one that never stopped. Its files in `folder` are
    checkpoint.safetensors (constant phase), decay.safetensors, loss.jsonl, and sittings.jsonl.
    """

    network: nn.Module
    loss_function: Callable[[Generator], Tensor]
    schedule: Schedule
    folder: Path
    seed: int

    def run(self) -> nn.Module:
        """Train `network` in place and return its averaged copy, in evaluation mode.

        UserError if a checkpoint is of another network.
        """
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.schedule.lr,
            betas=(0.9, self.schedule.beta2),
            weight_decay=self.schedule.weight_decay,
            fused=True,
        )
        decay = get_ema_multi_avg_fn(self.schedule.ema)
        self.average = AveragedModel(self.network, multi_avg_fn=decay, use_buffers=True)
        self.network.train()
        end = self.phase("checkpoint", self.schedule.steps)
        if self.schedule.decay:
            self.phase("decay", self.schedule.decay, decay_from=end)
        return self.average.module.eval().requires_grad_(False)

    def phase(self, name: str, steps: int, decay_from: int | None = None) -> int:
        """Train up to `steps`, or so many behind `decay_from`; the step where that ended."""
        path, began = self.folder / f"{name}.safetensors", decay_from or 0
        start = self.load(path, began) or began
        end = max(start, began + steps)
        if start:
            log.info("%s: taken up at step %d of %d", self.folder.name, start, end)
        _append(self.folder / "sittings.jsonl", {"from_step": start, "to_step": end})
        losses: list[float] = []
        steps_left = range(start + 1, end + 1)
        bar = tqdm(steps_left, self.folder.name, end, initial=start, disable=None, mininterval=5)
        for done in bar:
            losses.append(self.step(done - 1, learning_rate(done - 1, self.schedule, decay_from)))
            if done % LOG_EVERY == 0:
                loss, pictures = sum(losses) / len(losses), done * self.schedule.batch_size
                record = {"step": done, "pictures": pictures, "loss": round(loss, 6)}
                _append(self.folder / "loss.jsonl", record)
                losses.clear()
            if done % self.schedule.checkpoint_every == 0 or done == end:
                self.save(path, done, began)
        return end

    def step(self, step: int, rate: float) -> float:
        """One step of optimiser and average; the loss before it."""
        generator = Generator().manual_seed(self.seed * 1_000_003 + step)
        torch.manual_seed(self.seed * 1_000_003 + step)  # for the modules' own randomness
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.schedule.autocast):
            loss = self.loss_function(generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return loss.item()

    def save(self, path: Path, step: int, began: int) -> None:
        """All that is needed to go on, with the step, and the one at which the phase `began`."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"step": str(step), "began": str(began)})

    def load(self, path: Path, began: int) -> int:
        """The step to go on from; 0 where there is no checkpoint of a phase that began there."""
        if not path.exists():
            return 0
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
        with safe_open(path, framework="pt") as file:
            told = {name: int(number) for name, number in file.metadata().items()}
            if told["began"] != began:
                return 0
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part, name = key.split(".", 1)
                parts[part][name] = file.get_tensor(key)
        try:
            self.network.load_state_dict(parts["network"])
            self.average.load_state_dict(parts["average"])
        except RuntimeError as error:
            raise UserError(
                f"{path} was written for a network of other sizes than configured now; delete "
                f"{path.parent} to start this stage anew ({error})"
            ) from error
        state = self.optimizer.state_dict()
        for key, tensor in parts["optimizer"].items():
            index, name = key.split(".", 1)
            state["state"].setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(state)
        return told["step"]


@dataclass(frozen=True)
class Workshop:
    """The training's work folder and what every stage needs from outside it.

    Each stage owns one subfolder: its checkpoint while it trains, its result when it is done.
    """

    folder: Path
    parquet: str | None
    cache_folder: Path
    seed: int
    device: str

    @cached_property
    def photographs(self) -> dict[str, Photographs]:
        """generator | judge (the halves of the training split) | val (the held-out split)."""
        return load_photographs(self.parquet, self.cache_folder)

    def stage(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def train(self, stage: str, network: nn.Module, loss: Any, schedule: Schedule) -> Any:
        """The averaged copy of `network`, trained in the stage's folder (`Training.run`)."""
        return Training(network, loss, schedule, self.stage(stage), self.seed).run()

    def is_done(self, stage: str, settings: Any) -> bool:
        """Whether the stage was finished with these very settings, from what there is now."""
        entry = self.reported().get(stage)
        if entry is None or entry["settings"] != settings:
            return False
        return bool(self._begun_from(stage) == self._inputs(stage))

    def begin(self, stage: str) -> None:
        """Note what the stage is made from, before its first step.

        Raises UserError if an earlier stage is not finished, or if this one was begun from other
        results than there are now: its checkpoint does not fit them.
        """
        missing = [name for name in INPUTS[stage] if name not in self.reported()]
        if missing:
            raise UserError(f"stages: {stage} needs {', '.join(missing)} first")
        inputs, begun = self._inputs(stage), self._begun_from(stage)
        if begun is not None and begun != inputs:
            raise UserError(
                f"{self.stage(stage)} was begun from other results of {', '.join(INPUTS[stage])} "
                "than there are now; delete it to do this stage anew"
            )
        write_atomically(self.stage(stage) / "made_from.json", json.dumps(inputs).encode())

    def _inputs(self, stage: str) -> dict[str, str]:
        """What names the present results that the stage starts from."""
        reported = self.reported()
        return {name: short_digest(reported[name]) for name in INPUTS[stage] if name in reported}

    def _begun_from(self, stage: str) -> Any:
        return _read(self.folder / stage / "made_from.json")

    def report(self, stage: str, settings: Any, figures: dict[str, Any]) -> None:
        """Enter a finished stage in report.json."""
        entry = {"settings": settings, **figures}
        sittings = self.folder / stage / "sittings.jsonl"
        if sittings.exists():
            entry["sittings"] = [json.loads(line) for line in sittings.read_text().splitlines()]
        report = json.dumps(self.reported() | {stage: entry}, indent=2) + "\n"
        write_atomically(self.folder / "report.json", report.encode())
        log.info("%s done: %s", stage, figures)

    def reported(self) -> dict[str, dict[str, Any]]:
        """Settings and figures of the finished stages."""
        return _read(self.folder / "report.json") or {}


def _append(path: Path, record: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _read(path: Path) -> Any:
    return read_json(path) if path.exists() else None
