import io

import numpy as np
import pytest
from PIL import Image

from jaxeff import data
from jaxeff.data.detection_sets import pad_boxes


def test_boxes_are_y_first_relative_and_padded():
    pixels = np.array([[64, 48, 128, 240], [0, 0, 640, 480], [320, 120, 480, 360]], np.int16)
    boxes, labels, valid, degenerate = pad_boxes(
        pixels, np.array([2, 0, 1], np.uint8), np.array([0, 2, 2, 3]), (480, 640)
    )
    np.testing.assert_allclose(boxes[0], [[0.1, 0.1, 0.5, 0.2], [0, 0, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(boxes[2], [[0.25, 0.5, 0.75, 0.75], [0, 0, 0, 0]], rtol=1e-6)
    assert labels.tolist() == [[2, 0], [0, 0], [1, 0]]
    assert valid.tolist() == [[True, True], [False, False], [True, False]]
    assert degenerate.tolist() == [0, 0, 0]
    assert (boxes.dtype, labels.dtype, valid.dtype) == (np.float32, np.int32, np.bool_)


def test_boxes_without_area_are_left_out_and_counted():
    pixels = np.array([[5, 5, 5, 9], [1, 2, 3, 4], [7, 8, 9, 8]], np.int16)
    boxes, _, valid, degenerate = pad_boxes(pixels, np.zeros(3, np.uint8), np.array([0, 2, 3]), (10, 10))
    assert valid.tolist() == [[True], [False]]
    np.testing.assert_allclose(boxes[0, 0], [0.2, 0.1, 0.4, 0.3], rtol=1e-6)
    assert degenerate.tolist() == [1, 1]


@pytest.fixture
def bccd(data_folder):
    random = np.random.default_rng(0)
    files = []
    for _ in range(4):
        with io.BytesIO() as file:
            Image.fromarray(random.integers(0, 256, (480, 640, 3), np.uint8)).save(file, "JPEG", quality=30)
            files.append(file.getvalue())
    np.savez(
        data_folder / "bccd.npz",
        jpeg=np.frombuffer(b"".join(files), np.uint8),
        offset=np.cumsum([0, *map(len, files)]).astype(np.uint32),
        image_id=np.array([3, 5, 8, 13], np.int32),
        box=np.array([[0, 0, 64, 48], [1, 1, 1, 5], [64, 96, 128, 192]], np.int16),
        label=np.array([0, 1, 2], np.uint8),
        box_offset=np.array([0, 1, 1, 1, 3], np.int32),
        split_train=np.array([3, 0], np.int32),
        split_val=np.array([1], np.int32),
        split_test=np.array([2], np.int32),
    )
    return files


def test_bccd_rows_follow_the_split(bccd):
    dataset = data.load("bccd", "train")
    assert dataset.arrays["image_id"].tolist() == [13, 3]
    for row, image in enumerate((3, 0)):
        expected = np.asarray(Image.open(io.BytesIO(bccd[image])).convert("RGB"))
        np.testing.assert_array_equal(dataset.arrays["image"][row], expected)
    assert dataset.arrays["labels"].tolist() == [[2], [0]]
    assert dataset.info.facts["degenerate_boxes"] == 1
    assert dataset.info.task == "detection"


def test_bccd_validation_split_exists(bccd):
    dataset = data.load("bccd", "validation")
    assert dataset.arrays["valid"].tolist() == [[False]]
    assert dataset.info.facts["degenerate_boxes"] == 0


@pytest.mark.data
def test_bccd_has_the_published_counts():
    parts = [data.load("bccd", split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [205, 87, 72]
    labels = np.concatenate([part.arrays["labels"][part.arrays["valid"]] for part in parts])
    degenerate = sum(part.info.facts["degenerate_boxes"] for part in parts)
    assert degenerate == 2
    assert len(labels) == 4888 - degenerate
    boxes = np.concatenate([part.arrays["boxes"][part.arrays["valid"]] for part in parts])
    assert np.all((boxes >= 0) & (boxes <= 1))
    side = np.sqrt((boxes[:, 2] - boxes[:, 0]) * 480 * (boxes[:, 3] - boxes[:, 1]) * 640)
    for number, median in enumerate((102, 188, 39)):
        assert np.median(side[labels == number]) == pytest.approx(median, abs=2)
