"""Readers of the detection data files in `$JAXEFF_DATA`: BCCD blood cells."""

import numpy as np

from jaxeff.data.cache import cached_array, file_key
from jaxeff.data.dataset import Dataset, DatasetInfo
from jaxeff.data.local import data_file, decode_jpeg, read_npz

_BCCD_SPLITS = {"train": "split_train", "validation": "split_val", "test": "split_test"}
_BCCD_SIZE = (480, 640)  # height, width of every image, in pixels


def read_bccd(split: str) -> Dataset:
    """Reads the BCCD blood-cell detection set from `bccd.npz`; images are decoded once into the cache folder.

    Boxes without area (there are two, on image ids 338 and 343) are left out and counted. Crowded cells are
    under-annotated and a few platelets have no box, as published.

    Args:
      split: "train" (205 images), "validation" (87) or "test" (72), the official split.

    Returns:
      Data set with `image` uint8 [N, 480, 640, 3] (memory-mapped), `boxes` float32 [N, M, 4] (ymin, xmin, ymax, xmax
      in 0..1), `labels` int32 [N, M] (0 RBC, 1 WBC, 2 Platelets), `valid` bool [N, M] and `image_id` int32 [N]. M is
      the largest number of boxes on any image of all splits; the boxes of an image come first, and rows after them are
      zero with `valid` False. `info.facts["degenerate_boxes"]` counts the boxes left out of this split.

    Raises:
      NotHere: the file is not in `$JAXEFF_DATA`.
    """
    path = data_file("bccd.npz")
    pixels, label, box_offset, image_id, offset, chosen = read_npz(
        path, "box", "label", "box_offset", "image_id", "offset", _BCCD_SPLITS[split]
    )
    boxes, labels, valid, degenerate = pad_boxes(pixels, label, box_offset, _BCCD_SIZE)

    def decode(out: np.ndarray) -> None:
        (jpeg,) = read_npz(path, "jpeg")
        for row, image in enumerate(chosen):
            out[row] = decode_jpeg(jpeg[offset[image] : offset[image + 1]].tobytes())

    image = cached_array(f"bccd-{split}", file_key(path), (len(chosen), *_BCCD_SIZE, 3), np.uint8, decode)
    info = DatasetInfo(
        task="detection",
        num_classes=3,
        class_names=("RBC", "WBC", "Platelets"),
        citation="Shenggan (2017), BCCD Dataset",
        licence="MIT",
        notes="Crowded cells are under-annotated and a few platelets have no box, as published.",
        facts={"degenerate_boxes": int(degenerate[chosen].sum())},
    )
    arrays = {
        "image": image,
        "boxes": boxes[chosen],
        "labels": labels[chosen],
        "valid": valid[chosen],
        "image_id": image_id[chosen].astype(np.int32),
    }
    return Dataset("bccd", split, arrays, info)


def pad_boxes(
    pixels: np.ndarray, label: np.ndarray, offset: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turns ragged boxes in pixels into padded boxes relative to the image.

    Args:
      pixels: int [B, 4], (xmin, ymin, xmax, ymax) in pixels, as in Pascal VOC files.
      label: int [B], class of each box.
      offset: int [N + 1]; the boxes of image i are rows `offset[i] .. offset[i + 1] - 1`.
      size: (height, width) of the images in pixels.

    Returns:
      `(boxes, labels, valid, degenerate)`: boxes float32 [N, M, 4] as (ymin, xmin, ymax, xmax) in 0..1, labels int32
      [N, M], valid bool [N, M], and degenerate int [N], the number of boxes of each image that were left out because
      they have no area. M is the largest number of boxes with an area on one image, at least 1.
    """
    height, width = size
    has_area = (pixels[:, 2] > pixels[:, 0]) & (pixels[:, 3] > pixels[:, 1])
    owner = np.repeat(np.arange(len(offset) - 1), offset[1:].astype(np.int64) - offset[:-1])
    counts = np.bincount(owner[has_area], minlength=len(offset) - 1)
    degenerate = np.bincount(owner[~has_area], minlength=len(offset) - 1)
    valid = np.arange(max(counts.max(initial=0), 1)) < counts[:, None]
    boxes = np.zeros((*valid.shape, 4), np.float32)
    labels = np.zeros(valid.shape, np.int32)
    # `valid` is True row by row in the order in which `owner` runs, so a flat assignment puts each box in its image.
    boxes[valid] = pixels[has_area][:, [1, 0, 3, 2]] / np.array([height, width, height, width])
    labels[valid] = label[has_area]
    return boxes, labels, valid, degenerate
