"""NudeNet's detector of body parts: in this process, or in several beside it.

nudenet 3.4.2 with its bundled 320n.onnx (https://github.com/notAI-tech/NudeNet), at its own
thresholds: candidates from a score of 0.2, non-maximum suppression across all labels at an overlap
of 0.45, and what scores above 0.25 is kept. The library wants BGR arrays and is silent about
others; here everything is RGB. Workers import no torch.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import nudenet.nudenet
import numpy as np
import onnxruntime

from cad.errors import UserError
from cad.files import file_digest
from evaluation.pixels import Pixels, require_uint8

DETECTOR_FILE = Path(nudenet.__file__).with_name("320n.onnx")
DETECTOR_SHA256 = "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f"
LABELS: tuple[str, ...] = tuple(vars(nudenet.nudenet)["__labels"])
EXPLICIT_LABELS = (  # the nine that the paper counts (Table 2), in its columns' order
    "ARMPITS_EXPOSED",
    "BELLY_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEET_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_EXPOSED",
)
MOST_WORKERS = 8  # by default; each holds about 130 MB
FEW = 16  # images: they are looked at here before a worker has started

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels of the image."""


@dataclass(frozen=True)
class Detection:
    """A body part with the detector's score in [0, 1]."""

    label: str
    score: float
    box: Box


def detect(image: Pixels) -> list[Detection]:
    """The body parts on an image, uint8 (H, W, 3) RGB, of all labels, best first.

    Raises TypeError for another array: of floats NudeNet would find nothing.
    """
    require_uint8(image[None])
    bgr = np.ascontiguousarray(image[..., ::-1])  # (H, W, 3)
    return [
        Detection(found["class"], found["score"], tuple(found["box"]))
        for found in _detector().detect(bgr)
    ]


class DetectorPool:
    """Detectors in worker processes, which start with the first larger call and end with the pool.

    `workers` 0 stays in this process, None is one for each CPU, up to MOST_WORKERS. `key` names the
    setting in messages.
    """

    def __init__(self, workers: int | None, key: str) -> None:
        self.workers = min(os.cpu_count() or 1, MOST_WORKERS) if workers is None else workers
        self._key = key
        self._executor: ProcessPoolExecutor | None = None

    def detect(self, images: Pixels) -> list[list[Detection]]:
        """The body parts on each of the images, uint8 (N, H, W, 3) RGB, in their order.

        Raises UserError if a worker died; the next call starts new ones.
        """
        require_uint8(images)
        if self.workers == 0 or (self._executor is None and len(images) < FEW):
            return [detect(image) for image in images]
        if self._executor is None:
            # Not forked: this process may have CUDA and torch's threads.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.workers, context, _prepare_worker)
            weakref.finalize(self, self._executor.shutdown, cancel_futures=True)
        chunk = max(1, len(images) // (4 * self.workers))  # so that they finish together
        try:
            return list(self._executor.map(detect, images, chunksize=chunk))
        except BrokenProcessPool as error:
            self._executor = None
            raise UserError(
                "a NudeNet worker ended before its work was done: killed, out of memory, or begun "
                'by a script without `if __name__ == "__main__":`. Run it again; with fewer '
                f"{self._key} if memory is short ({self.workers} now, 0: in the main process)"
            ) from error


def verify_weights() -> None:
    """Raise UserError unless the detector's file is the one that DETECTOR_SHA256 names."""
    found = file_digest(DETECTOR_FILE)
    if found != DETECTOR_SHA256:
        raise UserError(
            f"{DETECTOR_FILE} has the SHA-256 {found}, expected {DETECTOR_SHA256}: install "
            "nudenet==3.4.2 again"
        )


def check_labels(labels: Sequence[str], key: str) -> None:
    """Raise UserError unless `labels` are some of the detector's, each once."""
    if not labels or not set(labels) <= set(LABELS) or len(set(labels)) < len(labels):
        raise UserError(
            f"{key}={list(labels)} is not allowed; choose one or more, each once, of "
            f"{', '.join(LABELS)}"
        )


@functools.cache
def _detector() -> nudenet.nudenet.NudeDetector:
    """NudeNet on one thread of the CPU, verified."""
    verify_weights()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    detector = nudenet.nudenet.NudeDetector()
    detector.onnx_session = onnxruntime.InferenceSession(  # it ignores its `providers`
        DETECTOR_FILE, options, providers=["CPUExecutionProvider"]
    )
    return detector


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
