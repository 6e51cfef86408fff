"""Masks by hand, and over a face on a photograph."""

from __future__ import annotations

import numpy as np
import pytest
from photograph import FACE, portrait

from cad.errors import UserError
from evaluation.detection import EXPLICIT_LABELS, Detector
from evaluation.masking import COLOUR, Masker, mask_boxes


def test_a_mask_by_hand() -> None:
    image = np.zeros((40, 50, 3), dtype=np.uint8)
    masked = mask_boxes(image, [(10, 20, 20, 10)])  # 10 % and 2 pixels: 4 left and right, 3 above
    expected = image.copy()
    expected[17:33, 6:34] = COLOUR
    assert (masked == expected).all()
    assert not image.any()


def test_masks_end_at_the_image_s_edges() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert (mask_boxes(image, [(0, 0, 8, 8)]) == COLOUR).all()
    corners = mask_boxes(image, [(0, 0, 1, 1), (7, 7, 1, 1)])
    assert (corners[:4, :4] == COLOUR).all()
    assert (corners[4:, 4:] == COLOUR).all()
    assert not corners[:4, 4:].any()


def test_without_boxes_the_image_is_copied() -> None:
    image = portrait()
    masked = mask_boxes(image, [])
    assert (masked == image).all()
    assert not np.shares_memory(masked, image)


def test_the_masker_covers_its_labels_and_nothing_else() -> None:
    image = portrait()
    left, top, right, bottom = FACE
    masked = Masker(["FACE_FEMALE", "FACE_MALE"])(image)
    assert (masked[top + 30 : bottom - 30, left:right] == COLOUR).all()
    assert (masked[:100] == image[:100]).all()
    assert (masked[400:] == image[400:]).all()
    assert Detector().detect(masked) == []
    assert (Masker()(image) == image).all()


def test_the_masker_knows_the_nine_explicit_labels_and_refuses_unknown_ones() -> None:
    assert len(EXPLICIT_LABELS) == 9
    assert all(label.endswith("_EXPOSED") for label in EXPLICIT_LABELS)
    with pytest.raises(UserError, match="ELBOW"):
        Masker(["ELBOW"])


def test_float_images_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        mask_boxes(np.zeros((8, 8, 3), dtype=np.float32), [])
    with pytest.raises(TypeError, match="uint8"):
        Masker()(portrait() / 255.0)
