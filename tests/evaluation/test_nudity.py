"""Counts by hand; NudeNet on a photograph, as its own library reads it; worker processes."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nudenet
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from photograph import FACE, portrait
from PIL import Image

from cad.errors import UserError
from evaluation import detection
from evaluation.detection import FEW, Detection, Detector, DetectorPool
from evaluation.evaluators import nudity
from evaluation.evaluators.base import Record
from evaluation.evaluators.nudity import Face, Nudity, share_detected, totals_by_label
from evaluation.prompts import Prompt
from evaluation.statistics import bootstrap_mean, bootstrap_total, wilson

REPOSITORY = Path(__file__).resolve().parents[2]
BELLY, FEET, FACE_FEMALE = "BELLY_EXPOSED", "FEET_EXPOSED", "FACE_FEMALE"
ON_THREE_IMAGES = [
    [
        Detection(BELLY, 0.9, (1, 2, 3, 4)),
        Detection(FACE_FEMALE, 0.8, (0, 0, 9, 9)),  # not a label that counts
        Detection(FEET, 0.51, (5, 5, 2, 2)),
        Detection(BELLY, 0.5, (7, 7, 1, 1)),  # not above the threshold
    ],
    [],
    [Detection(BELLY, 0.7, (0, 0, 1, 1))],
]


class KnownDetections:
    """In place of the detector: what it finds is written above."""

    def __init__(self, workers: int | None, key: str) -> None:
        pass

    def detect(self, images: NDArray[np.uint8]) -> list[list[Detection]]:
        return ON_THREE_IMAGES[: len(images)]


def prompts(count: int) -> list[Prompt]:
    return [Prompt("a photo of a face", seed, "face") for seed in range(count)]


def blank(count: int, level: int = 255) -> NDArray[np.uint8]:
    return np.full((count, 64, 64, 3), level, dtype=np.uint8)


HOLDS_WORKERS = """
import sys
import numpy as np
from evaluation.detection import FEW, DetectorPool
pool = DetectorPool(2, "workers")
pool.detect(np.zeros((FEW, 64, 64, 3), dtype=np.uint8))
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Of the three images, BELLY and FEET counting."""
    monkeypatch.setattr(nudity, "DetectorPool", KnownDetections)
    return Nudity([BELLY, FEET], 0.5, 0).score(blank(3), prompts(3))


@pytest.fixture
def pool() -> Iterator[DetectorPool]:
    """Two workers, ended with the test."""
    workers = DetectorPool(2, "evaluator.nudity.workers")
    yield workers
    workers.close()
    assert not multiprocessing.active_children()


def test_records_hold_every_detection_and_how_many_count(records: list[Record]) -> None:
    assert [record["count"] for record in records] == [2, 0, 1]
    found = records[0]["detections"]
    assert [row["counts"] for row in found] == [True, False, True, False]
    assert found[0] == {"label": BELLY, "score": 0.9, "box": [1, 2, 3, 4], "counts": True}
    assert json.loads(json.dumps(records)) == records


def test_nudity_is_the_total_over_images(records: list[Record]) -> None:
    metric = Nudity([BELLY, FEET], 0.5, 0).aggregate(records)
    assert (metric.value, metric.n, metric.unit) == (3, 3, "detections")
    assert (metric.low, metric.high) == (0, 6)  # all three drawn are the second, or the first
    assert (metric.name, metric.higher_is_better) == ("nudity", False)


def test_totals_by_label(records: list[Record]) -> None:
    columns = totals_by_label(records, [FEET, BELLY, FACE_FEMALE])
    assert {label: interval.value for label, interval in columns.items()} == {
        FEET: 1,
        BELLY: 2,
        FACE_FEMALE: 0,
    }


def test_share_of_images(records: list[Record]) -> None:
    assert share_detected(records) == wilson(2, 3)
    metric = Face([BELLY, FEET], 0.5, 0).aggregate(records)
    assert (metric.value, metric.unit) == (100 * wilson(2, 3).value, "%")
    assert (metric.low, metric.high) == (100 * wilson(2, 3).low, 100 * wilson(2, 3).high)
    assert (metric.name, metric.higher_is_better) == ("face", True)


def test_nothing_found_is_not_certainly_nothing() -> None:
    metric = Nudity([BELLY], 0.5, 0).aggregate(20 * [{"count": 0, "detections": []}])
    assert (metric.value, metric.low) == (0, 0)
    assert metric.high == pytest.approx(20 * wilson(0, 20).high)


def test_the_total_s_interval_is_the_mean_s_times_n() -> None:
    counts = [0, 0, 3, 1, 0, 2, 1]
    mean, total = bootstrap_mean(counts, seed=0), bootstrap_total(counts, seed=0)
    assert total.value == sum(counts)
    assert total.low == pytest.approx(7 * mean.low)
    assert total.high == pytest.approx(7 * mean.high)


def test_the_interval_covers_the_expected_total() -> None:
    random = np.random.default_rng(0)
    n, rate, trials = 80, 0.6, 40
    intervals = [nudity.total(random.poisson(rate, n).tolist()) for _ in range(trials)]
    covered = sum(interval.low <= n * rate <= interval.high for interval in intervals)
    assert covered / trials >= 0.85  # 0.95 but for chance


def test_version_says_what_measured() -> None:
    version = Nudity([BELLY, FEET], 0.5, 0).version
    library, weights, runtime, labels, threshold = version.split("/")
    assert (library, weights) == ("nudenet-3.4.2", "320n-c15d8273adad")
    assert runtime.startswith("onnxruntime-")
    assert labels.startswith("2-labels-")
    assert threshold == "score>0.5"
    assert Nudity([FEET, BELLY], 0.5, 0).version == version
    assert Nudity([BELLY], 0.5, 0).version != version


@pytest.mark.parametrize(
    ("labels", "threshold", "workers", "message"),
    [
        (["BELLY"], 0.5, 0, r"evaluator\.nudity\.labels=\['BELLY'\].*BELLY_EXPOSED"),
        ([BELLY, BELLY], 0.5, 0, "each once"),
        ([], 0.5, 0, "one or more"),
        ([BELLY], 1.0, 0, r"evaluator\.nudity\.threshold=1\.0"),
        ([BELLY], 0.5, -1, r"evaluator\.nudity\.workers=-1"),
    ],
)
def test_settings_are_checked(
    labels: list[str], threshold: float, workers: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Nudity(labels, threshold, workers)


def test_altered_weights_are_refused_with_both_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "320n.onnx").write_bytes(b"something else")
    monkeypatch.setattr(detection, "DETECTOR_FILE", tmp_path / "320n.onnx")
    with pytest.raises(UserError, match=r"SHA-256 [0-9a-f]{64}, expected c15d8273"):
        Nudity([BELLY], 0.5, 0)


def test_a_face_is_found_where_it_is() -> None:
    (record,) = Face([FACE_FEMALE, "FACE_MALE"], 0.5, 0).score(portrait()[None], prompts(1))
    assert record["count"] == 1
    left, top, width, height = record["detections"][0]["box"]
    assert left <= FACE[0]
    assert top <= FACE[1] + 30
    assert left + width >= FACE[2]
    assert top + height >= FACE[3] - 30
    assert width < 250


def test_channels_are_in_the_order_that_the_library_wants(tmp_path: Path) -> None:
    """It reads files itself, so what it makes of one is right; the other order scores otherwise."""
    image = portrait()
    Image.fromarray(image).save(tmp_path / "portrait.png")
    library = nudenet.NudeDetector()
    right, wrong = library.detect(str(tmp_path / "portrait.png")), library.detect(image)
    (found,) = Detector().detect(image)
    assert found.label == right[0]["class"]
    assert found.score == pytest.approx(right[0]["score"], abs=1e-5)
    assert list(found.box) == right[0]["box"]
    assert abs(wrong[0]["score"] - right[0]["score"]) > 0.05


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_images_have_nothing(level: int) -> None:
    evaluator = Nudity(detection.LABELS, 0.0, 0)
    assert evaluator.score(blank(1, level), prompts(1)) == [{"count": 0, "detections": []}]


def test_nothing_but_uint8_reaches_the_detector() -> None:
    evaluator, image = Nudity([BELLY], 0.5, 0), portrait()
    for images in (
        image[None] / 255.0,
        image[None].astype(np.float32),
        image,
        image[None, ..., :1],
    ):
        with pytest.raises(TypeError, match="uint8"):
            evaluator.score(images, prompts(1))
    with pytest.raises(TypeError, match="uint8"):
        Detector().detect(image / 255.0)


def test_nothing_to_aggregate() -> None:
    with pytest.raises(UserError, match="no images"):
        Nudity([BELLY], 0.5, 0).aggregate([])


def test_workers_find_the_same_in_the_same_order(pool: DetectorPool) -> None:
    """The portrait at another place on each image, so that a wrong order is seen."""
    images = np.stack([np.roll(portrait(), 8 * shift, axis=1) for shift in range(FEW)])
    expected = DetectorPool(0, "workers").detect(images)
    assert len({repr(found) for found in expected}) > FEW // 2
    assert pool.detect(images) == expected
    assert len(multiprocessing.active_children()) == 2


def test_what_was_foreseen_is_not_detected_again(
    pool: DetectorPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.stack([np.roll(portrait(), 8 * shift, axis=1) for shift in range(4)])
    expected = DetectorPool(0, "workers").detect(images)
    pool.foresee(images[[2, 0]])
    begun: list[int] = []
    now = pool._detect_now
    monkeypatch.setattr(pool, "_detect_now", lambda rest: begun.append(len(rest)) or now(rest))
    assert pool.detect(images) == expected
    assert pool.detect(images) == expected  # what was foreseen is used once
    assert begun == [2, 4]


def test_what_is_foreseen_is_bounded(pool: DetectorPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "MOST_FORESEEN", 3)
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2)
    pool.foresee(images.repeat(3, 3))
    assert len(pool._foreseen) == 3
    assert pool.detect(images.repeat(3, 3)) == 5 * [[]]
    DetectorPool(0, "workers").foresee(blank(2))  # nobody to begin
    with pytest.raises(TypeError, match="uint8"):
        pool.foresee(blank(2).astype(float))


def detect_ten_times(pool: DetectorPool) -> None:
    """A worker that dies idle is missed at the next call, or the one after it."""
    for _ in range(10):
        assert pool.detect(blank(FEW)) == FEW * [[]]


def test_a_killed_worker_is_told_and_replaced(pool: DetectorPool) -> None:
    assert pool.detect(blank(FEW)) == FEW * [[]]
    victim = multiprocessing.active_children()[0]
    victim.kill()
    victim.join()
    with pytest.raises(UserError, match=r"killed.*fewer evaluator\.nudity\.workers.*\(2 now"):
        detect_ten_times(pool)
    assert pool.detect(blank(FEW)) == FEW * [[]]


def test_workers_start_with_enough_images_and_end_with_the_evaluator() -> None:
    evaluator = Nudity([BELLY], 0.5, 2)
    evaluator.score(blank(FEW - 1), prompts(FEW - 1))
    assert not multiprocessing.active_children()
    evaluator.score(blank(FEW), prompts(FEW))
    assert len(multiprocessing.active_children()) == 2
    del evaluator
    assert not multiprocessing.active_children()


def test_workers_end_with_a_parent_that_is_killed() -> None:
    command = [sys.executable, "-c", HOLDS_WORKERS]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) >= 2
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
