import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import data

# Distinct pixels, so that every crop, flip and mixture can be told from every other.
IMAGES = np.arange(16 * 6 * 5 * 2).reshape(16, 6, 5, 2).astype(np.float32) + 1
KEY = jax.random.key(0)


def _crop_of(image, result, padding, mode):
    """The corner at which NumPy cuts `result` out of the padded `image`, or None."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    height, width, _ = image.shape
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            if np.array_equal(padded[row : row + height, column : column + width], result):
                return row, column
    return None


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_crop_is_a_window_of_the_padded_image(mode):
    cropped = np.asarray(data.random_crop(KEY, IMAGES, padding=2, mode=mode))
    corners = [_crop_of(image, result, 2, mode) for image, result in zip(IMAGES, cropped, strict=True)]
    assert None not in corners
    assert len(set(corners)) > 4  # 16 images do not share one offset.


def test_crop_reaches_every_offset():
    images = np.broadcast_to(IMAGES[:1], (400, *IMAGES.shape[1:]))
    cropped = np.asarray(data.random_crop(KEY, images, padding=1))
    assert len({_crop_of(IMAGES[0], result, 1, "constant") for result in cropped}) == 9


def test_crop_without_padding_is_the_image():
    np.testing.assert_array_equal(data.random_crop(KEY, IMAGES, padding=0), IMAGES)


def test_flip_mirrors_columns_of_some_images():
    flipped = np.asarray(data.random_flip(KEY, IMAGES))
    mirrored = [np.array_equal(result, image[:, ::-1]) for image, result in zip(IMAGES, flipped, strict=True)]
    kept = [np.array_equal(result, image) for image, result in zip(IMAGES, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 0 < sum(mirrored) < 16


def test_flip_probability_holds_at_its_ends():
    np.testing.assert_array_equal(data.random_flip(KEY, IMAGES, probability=1), IMAGES[:, :, ::-1])
    np.testing.assert_array_equal(data.random_flip(KEY, IMAGES, probability=0), IMAGES)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_cutout_blanks_one_square_around_a_pixel(size):
    holes = np.asarray(data.cutout(KEY, IMAGES, size=size, fill=-7))
    seen = set()
    for image, result in zip(IMAGES, holes, strict=True):
        matches = []
        for row in range(6):
            for column in range(5):
                top, left = row - size // 2, column - size // 2
                expected = image.copy()
                expected[max(top, 0) : top + size, max(left, 0) : left + size] = -7
                if np.array_equal(expected, result):
                    matches.append((row, column))
        assert matches
        seen.add(matches[0])
    assert size == 20 or len(seen) > 4


def test_cutout_fills_each_channel_with_its_own_value():
    holes = np.asarray(data.cutout(KEY, IMAGES, size=50, fill=np.array([3.0, 4.0])))
    np.testing.assert_array_equal(holes, np.broadcast_to([3.0, 4.0], IMAGES.shape))


def test_mixup_mixes_images_as_it_mixes_labels():
    labels = np.arange(16)  # One class per row: the soft label tells the partner and the weight.
    images, soft = (np.asarray(array) for array in data.mixup(KEY, IMAGES, labels, alpha=1.0, num_classes=16))
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(images, np.einsum("bk,khwc->bhwc", soft, IMAGES), rtol=1e-5)
    assert soft.dtype == np.float32
    # One weight for the batch, and partners that are a permutation: columns add up to one as well.
    np.testing.assert_allclose(soft.sum(axis=0), 1, rtol=1e-6)
    assert len(np.unique(soft.round(5))) <= 4


def test_mixup_of_soft_labels_equals_mixup_of_classes():
    labels = np.arange(16) % 3
    hard = data.mixup(KEY, IMAGES, labels, alpha=0.3, num_classes=16)
    soft = data.mixup(KEY, IMAGES, np.eye(16, dtype=np.float32)[labels], alpha=0.3)
    np.testing.assert_array_equal(hard[1], soft[1])
    np.testing.assert_array_equal(hard[0], soft[0])


def test_mixup_weight_follows_the_beta_distribution():
    labels = np.arange(16)
    keys = jax.random.split(KEY, 500)
    # Each row keeps the weight of its own class, or 1 where it is its own partner.
    mixed = [data.mixup(key, IMAGES, labels, alpha=0.5, num_classes=16)[1] for key in keys]
    weight = np.array([np.diag(soft).min() for soft in mixed])
    # Mean 1/2 and variance 1 / (4 (2 alpha + 1)) of Beta(alpha, alpha); four standard errors of 500 draws.
    assert weight.mean() == pytest.approx(1 / 2, abs=4 * np.sqrt(1 / 8 / 500))
    assert weight.var() == pytest.approx(1 / 8, abs=4 * np.std((weight - 0.5) ** 2) / np.sqrt(500))


def test_standardise_is_the_textbook_formula():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 2), np.uint8)
    mean, std = np.array([0.4, 0.5]), np.array([0.2, 0.25])
    expected = (images.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(data.standardise(images, mean, std), expected, atol=1e-5)
    assert data.standardise(images, mean, std, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_channel_statistics_are_those_of_numpy():
    images = np.random.default_rng(0).integers(0, 200, (5, 4, 3, 2), np.uint8)
    images[..., 1] = 9
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, [(images[..., 0] / 255).std(), 1], rtol=1e-6)


OPERATIONS = {
    "crop": lambda key, images: data.random_crop(key, images, padding=1),
    "flip": data.random_flip,
    "cutout": lambda key, images: data.cutout(key, images, size=2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_same_key_same_result_and_other_key_another(name):
    operation = OPERATIONS[name]
    np.testing.assert_array_equal(operation(KEY, IMAGES), operation(KEY, IMAGES))
    assert not np.array_equal(operation(KEY, IMAGES), operation(jax.random.key(1), IMAGES))


@pytest.mark.parametrize("name", OPERATIONS)
def test_jit_and_vmap_change_nothing(name):
    operation = OPERATIONS[name]
    keys, stacked = jax.random.split(KEY, 3), np.stack([IMAGES, IMAGES * 2, IMAGES * 3])
    plain = np.stack([operation(key, images) for key, images in zip(keys, stacked, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(operation))(keys, stacked), plain)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_shape_and_dtype_are_kept(name, dtype):
    images = np.ones((3, 4, 6, 1), dtype)
    result = OPERATIONS[name](KEY, images)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)


def test_strengths_may_be_traced():
    @jax.jit
    def both(probability, alpha):
        images = data.random_flip(KEY, IMAGES, probability=probability)
        return data.mixup(KEY, images, jnp.arange(16), alpha=alpha, num_classes=16)

    for strength in (0.1, 0.5, 0.9):
        both(strength, strength)
    assert both._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.random_crop(KEY, IMAGES[0]), r"axes \[B, H, W, C\], got shape \(6, 5, 2\)"),
        (lambda: data.random_crop(KEY, IMAGES, padding=-1), "padding=-1"),
        (lambda: data.random_crop(KEY, IMAGES, mode="wrap"), "valid modes: constant, edge, reflect"),
        (lambda: data.random_crop(KEY, IMAGES, padding=5, mode="reflect"), "padding=5 must be below"),
        (lambda: data.random_flip(KEY, IMAGES, probability=1.5), "probability=1.5 is out of range"),
        (lambda: data.random_flip(KEY, IMAGES, probability=float("nan")), "probability=nan"),
        (lambda: data.cutout(KEY, IMAGES, size=0), "size=0"),
        (lambda: data.mixup(KEY, IMAGES, np.arange(3), alpha=1.0, num_classes=3), "do not fit images"),
        (lambda: data.mixup(KEY, IMAGES, np.arange(16), alpha=1.0), "num_classes=None"),
        (lambda: data.mixup(KEY, IMAGES, np.eye(16), alpha=1.0, num_classes=5), "num_classes=5 does not fit"),
        (lambda: data.mixup(KEY, IMAGES, np.arange(16), alpha=0, num_classes=16), "alpha=0 must be above 0"),
        (lambda: data.standardise(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(2), 1), r"mean of shape \(2,\)"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bytes_are_not_mixed():
    with pytest.raises(TypeError, match="call standardise first"):
        data.mixup(KEY, np.zeros((2, 1), np.uint8), np.arange(2), alpha=1.0, num_classes=2)


def test_floats_are_not_divided_by_255_again():
    with pytest.raises(TypeError, match="uint8, got float32"):
        data.standardise(IMAGES, 0, 1)


def test_fraction_is_not_cut_off_to_fill_bytes():
    with pytest.raises(TypeError, match="fill=0.5 must be an integer"):
        data.cutout(KEY, np.zeros((1, 4, 4, 1), np.uint8), size=1, fill=0.5)
