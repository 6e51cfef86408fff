"""NudeNet's detector of body parts: in this process, or in several beside it.

nudenet 3.4.2 with its bundled 320n.onnx (https://github.com/notAI-tech/NudeNet), at its own
thresholds: candidates from a score of 0.2, non-maximum suppression across all labels at an overlap
of 0.45, and what scores above 0.25 is kept. The library wants BGR arrays and is silent about
others; here everything is RGB, and it turns them. Workers import no torch.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nudenet.nudenet
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cad.errors import UserError
from evaluation.evaluators.base import require_uint8

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
CHUNKS_PER_WORKER = 4  # pieces of a call, so that the workers finish together
MOST_FORESEEN = 256  # images that wait for a worker at once: 200 MB of 512 x 512 pixels

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels of the image."""


@dataclass(frozen=True)
class Detection:
    """A body part with the detector's score in [0, 1]."""

    label: str
    score: float
    box: Box


class Detector:
    """NudeNet on one thread of the CPU. Raises UserError if its weights are not the known ones."""

    def __init__(self) -> None:
        verify_weights()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._nudenet = nudenet.nudenet.NudeDetector()
        self._nudenet.onnx_session = onnxruntime.InferenceSession(  # it ignores its `providers`
            DETECTOR_FILE, options, providers=["CPUExecutionProvider"]
        )

    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """What is on an image, uint8 (H, W, 3) RGB, of all labels, best first.

        Raises TypeError for another array: of floats NudeNet would find nothing.
        """
        require_uint8(image[None])
        bgr = np.ascontiguousarray(image[..., ::-1])  # (H, W, 3)
        return [
            Detection(found["class"], found["score"], tuple(found["box"]))
            for found in self._nudenet.detect(bgr)
        ]


class DetectorPool:
    """Detectors in worker processes, which start with the first larger call and end with the pool.

    `workers` 0 stays in this process, None is one for each CPU, up to MOST_WORKERS; no result
    depends on it. `key` names the setting in messages. Raises UserError for a negative number or
    if the detector's weights are not the known ones.
    """

    def __init__(self, workers: int | None, key: str) -> None:
        if workers is not None and workers < 0:
            raise UserError(f"{key}={workers} is not allowed; choose 0 or more, or null")
        verify_weights()
        self.workers = min(os.cpu_count() or 1, MOST_WORKERS) if workers is None else workers
        self._key = key
        self._executor: ProcessPoolExecutor | None = None
        self._end: Callable[[], object] = lambda: None
        self._foreseen: dict[bytes, Future[list[Detection]]] = {}  # by `_fingerprint`

    def foresee(self, images: NDArray[np.uint8]) -> None:
        """Begin with images that `detect` will be asked about, beside whatever this process does.

        Returns at once. Images beyond MOST_FORESEEN that are not looked at yet are left to
        `detect`, so memory is bounded; so is everything if a worker dies. Without workers there is
        nothing to do. Raises TypeError as `detect`.
        """
        require_uint8(images)
        if self.workers == 0:
            return
        waiting = sum(not future.done() for future in self._foreseen.values())
        try:
            for image in images[: max(0, MOST_FORESEEN - waiting)]:
                self._foreseen[_fingerprint(image)] = self._running().submit(_detect, image)
        except BrokenProcessPool:
            self.close()

    def detect(self, images: NDArray[np.uint8]) -> list[list[Detection]]:
        """What is on each of the images, uint8 (N, H, W, 3) RGB, in their order.

        Raises TypeError for other arrays, and UserError if a worker died: the next call starts new
        ones.
        """
        require_uint8(images)
        try:
            begun = [self._take_foreseen(image) for image in images]
            rest = np.array([future is None for future in begun], dtype=bool)  # (N,)
            found = iter(self._detect_now(images[rest]))
            return [next(found) if future is None else future.result() for future in begun]
        except BrokenProcessPool as error:
            self.close()
            raise UserError(
                "a NudeNet worker ended before its work was done: killed, out of memory, or begun "
                'by a script without `if __name__ == "__main__":`. Run it again; with fewer '
                f"{self._key} if memory is short ({self.workers} now, 0: in the main process)"
            ) from error

    def close(self) -> None:
        """End the workers and wait for it."""
        self._end()
        self._executor = None
        self._foreseen.clear()

    def _take_foreseen(self, image: NDArray[np.uint8]) -> Future[list[Detection]] | None:
        return self._foreseen.pop(_fingerprint(image), None) if self._foreseen else None

    def _detect_now(self, images: NDArray[np.uint8]) -> Sequence[list[Detection]]:
        if self.workers == 0 or (self._executor is None and len(images) < FEW):
            return [_detect(image) for image in images]
        pieces = CHUNKS_PER_WORKER * self.workers
        chunk = max(1, len(images) // pieces)
        return list(self._running().map(_detect, images, chunksize=chunk))

    def _running(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Not forked: this process may have CUDA and torch's threads.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.workers, context, _prepare_worker)
            self._end = weakref.finalize(self, self._executor.shutdown, cancel_futures=True)
        return self._executor


def detector_version() -> str:
    """What detects: nudenet, the start of its weights' SHA-256, and what runs them."""
    weights = f"{DETECTOR_FILE.stem}-{DETECTOR_SHA256[:12]}"
    return f"nudenet-{version('nudenet')}/{weights}/onnxruntime-{onnxruntime.__version__}"


def verify_weights() -> None:
    """Raise UserError unless the detector's file is the one that DETECTOR_SHA256 names."""
    found = hashlib.sha256(DETECTOR_FILE.read_bytes()).hexdigest()
    if found != DETECTOR_SHA256:
        raise UserError(
            f"{DETECTOR_FILE} has the SHA-256 {found}, expected {DETECTOR_SHA256}: install "
            "nudenet==3.4.2 again"
        )


def check_labels(labels: Sequence[str], key: str) -> None:
    """Raise UserError unless `labels` are some of the detector's, each once."""
    unknown = [label for label in labels if label not in LABELS]
    if unknown or not labels or len(set(labels)) < len(labels):
        raise UserError(
            f"{key}={list(labels)} is not allowed; choose one or more, each once, of "
            f"{', '.join(LABELS)}"
        )


def _fingerprint(image: NDArray[np.uint8]) -> bytes:
    shape = np.array(image.shape).tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(image).tobytes()).digest()


@functools.cache
def _detector() -> Detector:
    return Detector()


def _detect(image: NDArray[np.uint8]) -> list[Detection]:
    return _detector().detect(image)


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
