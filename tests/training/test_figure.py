"""Sheets of images, read back from the picture."""

import matplotlib.image
import numpy as np
import pytest

from jaxeff.training import figure


def test_sheets_show_the_images_row_by_row(tmp_path):
    # Four flat images in shades that nothing else of the figure has.
    images = (
        np.ones((4, 8, 8, 3), np.uint8)
        * np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0]])[:, None, None]
    )
    path = figure.draw_sheets({"real": images.astype(np.uint8)}, 2, tmp_path / "new" / "sheet.png", {"real": "below"})
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    places = [np.argwhere((pixels == image[0, 0]).all(-1)).mean(0) for image in images]
    first, right, below, diagonal = places
    assert right[1] > first[1] and abs(right[0] - first[0]) < 2
    assert below[0] > first[0] and abs(below[1] - first[1]) < 2
    np.testing.assert_allclose(diagonal, [below[0], right[1]], atol=2)


def test_images_that_do_not_fill_the_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"sheets\['real'\]: 3 images do not fill rows of columns=2"):
        figure.draw_sheets({"real": np.zeros((3, 4, 4, 1), np.uint8)}, 2, tmp_path / "sheet.png")
