"""Makes one image set in processes that are killed (SIGKILL) at the points given.

python killed_worker.py ROOT POINT [POINT ...]; a point is sample:N (before batch N of that process
is sampled), write:N (its Nth PNG is half written) or record:N (the Nth PNG is there, its record is
not). Writes how each process ended.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
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


def main(root: Path, points: list[str]) -> None:
    for point in points:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            arm(point)
            generation.generate(ToyModel(), PROMPTS, SETTINGS, root)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{point} {os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
