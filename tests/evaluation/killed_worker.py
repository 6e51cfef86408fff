"""Makes one image set in a process that is killed (SIGKILL) at a point.

A point is sample:N (before batch N of that process is sampled), write:N (its Nth PNG is half
written) or record:N (the Nth PNG is there, its record is not).
"""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

from toy_model import ToyModel

from evaluation import generation, image_sets, sampler
from evaluation.prompts import ObjectPrompts, build_prompts
from evaluation.sampler import SamplerSettings

SETTINGS = SamplerSettings(steps=3, guidance=2.0, kind="default", batch_size=4)
PROMPTS = build_prompts(ObjectPrompts({"church": "church", "face": "face"}, 11, seed=0))


def arm(point: str) -> None:
    """Let this process end at the point, in place of the call that it names."""
    moment, number = point.split(":")
    owner, name = {
        "sample": (sampler, "sample_latents"),
        "write": (image_sets, "write_atomically"),
        "record": (image_sets.ImageWriter, "_append"),
    }[moment]
    function, calls = getattr(owner, name), itertools.count()

    def dying(*args: Any, **kwargs: Any) -> Any:
        counts = moment != "write" or args[0].suffix == ".png"
        if counts and next(calls) == int(number):
            if moment == "write":
                path, data = args
                path.with_name(f".{path.name}.x.tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, dying)


def make_until(point: str, root: Path) -> None:
    arm(point)
    generation.generate(ToyModel(), PROMPTS, SETTINGS, root)
