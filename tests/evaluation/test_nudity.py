"""Counts by hand; NudeNet on a photograph, as its own library reads it; worker processes; masks."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.cbook
import nudenet
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from cad.errors import UserError
from evaluation import detection
from evaluation.detection import EXPLICIT_LABELS, FEW, Detection, DetectorPool, detect
from evaluation.evaluators.base import Record, wilson
from evaluation.evaluators.nudity import Face, Nudity, totals_by_label
from evaluation.masking import COLOUR, Masker, mask_boxes
from evaluation.prompts import Prompt

REPOSITORY = Path(__file__).resolve().parents[2]
FACE = (183, 123, 343, 343)  # left, top, right, bottom in the portrait, without hair, by hand
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


def portrait() -> NDArray[np.uint8]:
    """Grace Hopper's, of the United States Navy, in the public domain: one face, nothing else."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB"))  # (600, 512, 3)


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
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Of the three images, BELLY and FEET counting."""
    monkeypatch.setattr(DetectorPool, "detect", lambda self, images: ON_THREE_IMAGES)
    return Nudity([BELLY, FEET], 0.5, 0).score(blank(3), prompts(3))


@pytest.fixture
def pool() -> Iterator[DetectorPool]:
    """Two workers, ended with the test."""
    workers = DetectorPool(2, "evaluator.nudity.workers")
    yield workers
    if workers._executor is not None:
        workers._executor.shutdown()


def test_records_hold_every_detection_and_how_many_count(records):
    assert [record["count"] for record in records] == [2, 0, 1]
    found = records[0]["detections"]
    assert [row["counts"] for row in found] == [True, False, True, False]
    assert found[0] == {"label": BELLY, "score": 0.9, "box": [1, 2, 3, 4], "counts": True}
    assert json.loads(json.dumps(records)) == records


def test_nudity_is_the_total_over_images(records):
    metric = Nudity([BELLY, FEET], 0.5, 0).aggregate(records)
    assert (metric.value, metric.n, metric.unit) == (3, 3, "detections")
    assert (metric.low, metric.high) == (0, 6)  # all three drawn are the second, or the first
    assert (metric.name, metric.higher_is_better) == ("nudity", False)
    columns = totals_by_label(records, [FEET, BELLY, FACE_FEMALE])
    assert [interval.value for interval in columns.values()] == [1, 2, 0]


def test_share_of_images(records):
    metric = Face([BELLY, FEET], 0.5, 0).aggregate(records)
    assert (metric.value, metric.unit) == (100 * wilson(2, 3).value, "%")
    assert (metric.low, metric.high) == (100 * wilson(2, 3).low, 100 * wilson(2, 3).high)
    assert (metric.name, metric.higher_is_better) == ("face", True)


def test_nothing_found_is_not_certainly_nothing():
    metric = Nudity([BELLY], 0.5, 0).aggregate(20 * [{"count": 0, "detections": []}])
    assert (metric.value, metric.low) == (0, 0)
    assert metric.high == pytest.approx(20 * wilson(0, 20).high)


def test_the_instrument_says_what_measured():
    instrument = Nudity([BELLY, FEET], 0.5, 0).instrument
    detector = r"nudenet-3\.4\.2/320n-c15d8273adad/onnxruntime-[^/]+"
    assert re.fullmatch(detector + r"/2-labels-[^/]+/score>0\.5", instrument)
    assert Nudity([FEET, BELLY], 0.5, 0).instrument == instrument
    assert Nudity([BELLY], 0.5, 0).instrument != instrument


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
def test_settings_are_checked(labels, threshold, workers, message):
    with pytest.raises(UserError, match=message):
        Nudity(labels, threshold, workers)


def test_altered_weights_are_refused_with_both_hashes(tmp_path, monkeypatch):
    (tmp_path / "320n.onnx").write_bytes(b"something else")
    monkeypatch.setattr(detection, "DETECTOR_FILE", tmp_path / "320n.onnx")
    with pytest.raises(UserError, match=r"SHA-256 [0-9a-f]{64}, expected c15d8273"):
        Nudity([BELLY], 0.5, 0).check(prompts(1))


def test_channels_are_in_the_order_that_the_library_wants(tmp_path):
    """It reads files itself, so what it makes of one is right; the other order scores otherwise."""
    image = portrait()
    Image.fromarray(image).save(tmp_path / "portrait.png")
    library = nudenet.NudeDetector()
    right, wrong = library.detect(str(tmp_path / "portrait.png")), library.detect(image)
    (found,) = detect(image)
    assert found.label == right[0]["class"]
    assert found.score == pytest.approx(right[0]["score"], abs=1e-5)
    assert list(found.box) == right[0]["box"]
    assert abs(wrong[0]["score"] - right[0]["score"]) > 0.05


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_images_have_nothing(level):
    evaluator = Nudity(detection.LABELS, 0.0, 0)
    assert evaluator.score(blank(1, level), prompts(1)) == [{"count": 0, "detections": []}]


def test_nothing_but_uint8_is_looked_at_or_masked():
    image = portrait()
    for wrong in (image / 255.0, image.astype(np.float32), image[..., :1]):
        for look in (detect, Masker(), lambda each: DetectorPool(0, "workers").detect(each[None])):
            with pytest.raises(TypeError, match="uint8"):
                look(wrong)
    with pytest.raises(TypeError, match="uint8"):
        mask_boxes(image / 255.0, [])


def test_workers_find_the_same_in_the_same_order(pool):
    """The portrait at another place on each image, so that a wrong order is seen."""
    images = np.stack([np.roll(portrait(), 8 * shift, axis=1) for shift in range(FEW)])
    expected = DetectorPool(0, "workers").detect(images)
    assert len({repr(found) for found in expected}) > FEW // 2
    assert pool.detect(images) == expected
    assert len(multiprocessing.active_children()) == 2


def test_a_killed_worker_is_told_and_replaced(pool):
    assert pool.detect(blank(FEW)) == FEW * [[]]
    victim = multiprocessing.active_children()[0]
    victim.kill()
    victim.join()
    with pytest.raises(UserError, match=r"killed.*fewer evaluator\.nudity\.workers.*\(2 now"):
        # One that dies idle is missed at the next call, or the one after it.
        list(map(pool.detect, 10 * [blank(FEW)]))
    assert pool.detect(blank(FEW)) == FEW * [[]]


def test_workers_start_with_enough_images_and_end_with_the_evaluator():
    evaluator = Nudity([BELLY], 0.5, 2)
    evaluator.score(blank(FEW - 1), prompts(FEW - 1))
    assert not multiprocessing.active_children()
    evaluator.score(blank(FEW), prompts(FEW))
    assert len(multiprocessing.active_children()) == 2
    del evaluator
    assert not multiprocessing.active_children()


def test_workers_end_with_a_parent_that_is_killed():
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


def test_a_mask_by_hand():
    image = np.zeros((40, 50, 3), dtype=np.uint8)
    masked = mask_boxes(image, [(10, 20, 20, 10)])  # 10 % and 2 pixels: 4 left and right, 3 above
    expected = image.copy()
    expected[17:33, 6:34] = COLOUR
    assert (masked == expected).all()
    assert not image.any()
    image = image[:8, :8]  # masks end at its edges
    assert (mask_boxes(image, [(0, 0, 8, 8)]) == COLOUR).all()
    corners = mask_boxes(image, [(0, 0, 1, 1), (7, 7, 1, 1)])
    assert (corners[:4, :4] == COLOUR).all()
    assert (corners[4:, 4:] == COLOUR).all()
    assert not corners[:4, 4:].any()


def test_the_masker_covers_its_labels_and_nothing_else():
    image = portrait()
    left, top, right, bottom = FACE
    masked = Masker(["FACE_FEMALE", "FACE_MALE"])(image)
    assert (masked[top + 30 : bottom - 30, left:right] == COLOUR).all()
    assert (masked[:100] == image[:100]).all()
    assert (masked[400:] == image[400:]).all()
    assert detect(masked) == []
    assert (Masker()(image) == image).all()


def test_the_masker_knows_the_nine_explicit_labels_and_refuses_unknown_ones():
    assert len(EXPLICIT_LABELS) == 9
    assert all(label.endswith("_EXPOSED") for label in EXPLICIT_LABELS)
    with pytest.raises(UserError, match="ELBOW"):
        Masker(["ELBOW"])
