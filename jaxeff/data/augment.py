"""Image augmentation as pure functions of a key: they may be jitted, vmapped and composed with a training step."""

# B batch, H W spatial, C channels, K classes

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Values that can be checked; a jax array may be traced and then has no number yet.
_NUMBERS = (int, float, np.integer, np.floating)


def random_crop(key: jax.Array, images: jax.Array, *, padding: int = 4, mode: str = "constant") -> jax.Array:
    """Pads every image on all sides and cuts a window of the original size at a random place.

    Args:
      key: random key.
      images: [B, H, W, C], any dtype.
      padding: pixels added on each side, at least 0; below H and W for mode "reflect".
      mode: "constant" (zeros), "edge" or "reflect", as in `jnp.pad`.

    Returns:
      Images of the same shape and dtype; each has its own offset, uniform over (2 padding + 1)^2 places.

    Raises:
      ValueError: wrong rank, negative padding, or unknown mode.
    """
    _check_images(images)
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding={padding!r} must be a whole number of pixels, 0 or more")
    if mode not in ("constant", "edge", "reflect"):
        raise ValueError(f"mode={mode!r} is unknown; valid modes: constant, edge, reflect")
    if mode == "reflect" and padding >= min(images.shape[1:3]):
        raise ValueError(f"padding={padding} must be below the image size {images.shape[1:3]} for mode 'reflect'")
    return _random_crop(key, images, padding, mode)


def random_flip(key: jax.Array, images: jax.Array, *, probability: jax.typing.ArrayLike = 0.5) -> jax.Array:
    """Mirrors images left to right at random.

    Args:
      key: random key.
      images: [B, H, W, C], any dtype.
      probability: chance of each image to be mirrored, in 0..1; may be traced.

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: wrong rank, or probability outside 0..1.
    """
    _check_images(images)
    _check_range("probability", probability, 0, 1)
    return _random_flip(key, images, probability)


def cutout(key: jax.Array, images: jax.Array, *, size: int, fill: jax.typing.ArrayLike = 0) -> jax.Array:
    """Blanks a square at a random place of every image (DeVries and Taylor 2017, arXiv:1708.04552).

    The centre is uniform over the pixels of the image, so a square may reach over the border, as in the paper.

    Args:
      key: random key.
      images: [B, H, W, C], any dtype.
      size: side of the square in pixels, at least 1; the paper uses 16 for CIFAR-10.
      fill: value of the blanked pixels; a number or [C].

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: wrong rank, or size below 1.
      TypeError: images are integers and fill is not.
    """
    _check_images(images)
    if jnp.issubdtype(images.dtype, jnp.integer) and not jnp.issubdtype(jnp.result_type(fill), jnp.integer):
        raise TypeError(f"fill={fill} must be an integer for images of type {images.dtype}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size={size!r} must be a whole number of pixels, 1 or more")
    return _cutout(key, images, size, fill)


def mixup(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    alpha: jax.typing.ArrayLike,
    num_classes: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image and label with those of another row (Zhang et al. 2018, arXiv:1710.09412).

    As in the paper's code, one weight from Beta(alpha, alpha) is drawn for the whole batch, and the partners are a
    permutation of the batch.

    Args:
      key: random key.
      images: floating point [B, ...]; standardise bytes first.
      labels: int [B] (then `num_classes` is needed) or floating point [B, K], soft labels.
      alpha: parameter of the Beta distribution, above 0; may be traced.
      num_classes: K, for integer labels.

    Returns:
      `(images, labels)`: mixed images of the same shape and dtype, and soft labels [B, K], float32 for integer labels.

    Raises:
      TypeError: images are not floating point.
      ValueError: shapes do not fit, alpha <= 0, or `num_classes` is missing or does not fit soft labels.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be floating point to be mixed, got {images.dtype}; call standardise first")
    if labels.ndim not in (1, 2) or labels.shape[0] != images.shape[0]:
        raise ValueError(
            f"labels of shape {labels.shape} do not fit images of shape {images.shape}: expected [B] or [B, K]"
        )
    if labels.ndim == 1 and (num_classes is None or not jnp.issubdtype(labels.dtype, jnp.integer)):
        raise ValueError(
            f"labels [B] must be integers and need num_classes; got {labels.dtype}, num_classes={num_classes}"
        )
    if labels.ndim == 2 and num_classes not in (None, labels.shape[1]):
        raise ValueError(f"num_classes={num_classes} does not fit soft labels of shape {labels.shape}")
    if isinstance(alpha, _NUMBERS) and not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0; leave mixup out to turn it off")
    if num_classes is not None and labels.ndim == 1:
        labels = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return _mixup(key, images, labels, alpha)


def standardise(
    images: jax.Array,
    mean: jax.typing.ArrayLike,
    std: jax.typing.ArrayLike,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Maps bytes to zero mean and unit deviation per channel: (images / 255 - mean) / std.

    Args:
      images: uint8 [..., C].
      mean: [C] or a number, on the scale 0..1 (see `channel_statistics`).
      std: [C] or a number, on the scale 0..1.
      dtype: floating-point type of the result; the arithmetic is float32.

    Returns:
      Array of the same shape.

    Raises:
      TypeError: images are not bytes.
      ValueError: mean or std fits neither a number nor the channels.
    """
    _check_bytes(images)
    for name, value in (("mean", mean), ("std", std)):
        if np.shape(value) not in ((), (1,), images.shape[-1:]):
            raise ValueError(f"{name} of shape {np.shape(value)} does not fit images of shape {images.shape}")
    return _standardise(images, mean, std, dtype)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel, on the scale 0..1.

    Args:
      images: uint8 [N, H, W, C]; normally the training images.

    Returns:
      `(mean, std)`, float32 [C] each, computed exactly from histograms. A constant channel gets std 1.

    Raises:
      ValueError: wrong rank.
      TypeError: images are not bytes.
    """
    _check_images(images)
    _check_bytes(images)
    levels = np.arange(256) / 255
    histograms = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    share = histograms / histograms.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt(np.sum(share * (levels - mean[:, None]) ** 2, axis=1))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _random_crop(key: jax.Array, images: jax.Array, padding: int, mode: str) -> jax.Array:
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode=mode)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    cut = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])
    return jax.vmap(cut)(padded, corners)


@jax.jit
def _random_flip(key: jax.Array, images: jax.Array, probability: jax.typing.ArrayLike) -> jax.Array:
    chosen = jax.random.bernoulli(key, jnp.asarray(probability, jnp.float32), (len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


@functools.partial(jax.jit, static_argnums=2)
def _cutout(key: jax.Array, images: jax.Array, size: int, fill: jax.typing.ArrayLike) -> jax.Array:
    batch, height, width, _ = images.shape
    centre = jax.random.randint(key, (batch, 2), 0, jnp.array([height, width]))
    # Rows first .. first + size - 1 around the centre; an even size has its centre right of the middle.
    first = (centre - size // 2)[:, :, None]
    rows = (jnp.arange(height) >= first[:, 0]) & (jnp.arange(height) < first[:, 0] + size)
    columns = (jnp.arange(width) >= first[:, 1]) & (jnp.arange(width) < first[:, 1] + size)
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, jnp.asarray(fill, images.dtype), images)


@jax.jit
def _mixup(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    weight_key, partner_key = jax.random.split(key)
    alpha = jnp.asarray(alpha, jnp.float32)
    weight = jax.random.beta(weight_key, alpha, alpha)
    partner = jax.random.permutation(partner_key, len(images))
    mix = lambda own: (weight * own + (1 - weight) * own[partner]).astype(own.dtype)
    return mix(images), mix(labels)


@functools.partial(jax.jit, static_argnums=3)
def _standardise(
    images: jax.Array, mean: jax.typing.ArrayLike, std: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike
) -> jax.Array:
    return ((images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)).astype(dtype)


def _check_images(images: jax.Array | np.ndarray) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must have the axes [B, H, W, C], got shape {images.shape}")


def _check_range(name: str, value: jax.typing.ArrayLike, low: float, high: float) -> None:
    if isinstance(value, _NUMBERS) and not low <= value <= high:
        raise ValueError(f"{name}={value} is out of range; expected {low} .. {high}")


def _check_bytes(images: jax.Array | np.ndarray) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}; floating-point images are not divided by 255 again")
