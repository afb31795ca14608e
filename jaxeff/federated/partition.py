"""Who holds what: the examples of a data set dealt to clients, exactly and the same for one seed everywhere.

Every example goes to one client and to one only. With each part come its class counts, which feature-paired averaging
weighs by. The recipes are those of the literature (NIID-Bench, arXiv 2102.02079; N nodes x K classes of Fed2).

Letters: N clients, C classes, n examples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TRIES = 1000
"""How often a draw is repeated for parts that are large enough."""


class Partition(NamedTuple):
    """The parts of a data set.

    Attributes:
      indices: for each client the numbers of its examples, int64, ascending.
      class_counts: int64 [N, C], how many of each class it holds.
    """

    indices: tuple[np.ndarray, ...]
    class_counts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, int64 [N]."""
        return self.class_counts.sum(1)


def iid(labels: Any, clients: int, *, seed: int, num_classes: int | None = None) -> Partition:
    """Parts of equal size, drawn alike.

    Args:
      labels: integers [n], classes from 0 on.
      clients: N, at least 1 and at most n.
      seed: of the draw.
      num_classes: C; None for the highest label and one.

    Raises:
      TypeError: for labels that are not integers.
      ValueError: for labels of another rank or out of range, or clients without an example each.
    """
    labels, classes = _checked(labels, clients, num_classes)
    order = np.random.default_rng(seed).permutation(len(labels))
    return _parts(np.array_split(order, clients), labels, classes)


def by_classes(
    labels: Any, clients: int, classes_per_client: int, *, seed: int, num_classes: int | None = None
) -> Partition:
    """N nodes x K classes: every client holds K classes, and the examples of a class are split among its owners.

    Classes are dealt in rounds, so that none has more than one owner more than another.

    Args:
      labels, clients, seed, num_classes: as of `iid`.
      classes_per_client: K, in 1..C.

    Raises:
      TypeError, ValueError: as `iid`; where a class would be owned by nobody, or has fewer examples than owners.
    """
    labels, classes = _checked(labels, clients, num_classes)
    if not 1 <= classes_per_client <= classes:
        raise ValueError(f"classes_per_client must be in 1..{classes}, got {classes_per_client}")
    if clients * classes_per_client < classes:
        raise ValueError(
            f"{clients} clients of {classes_per_client} classes each hold {clients * classes_per_client} of the "
            f"{classes} classes, the others would be owned by nobody; let there be more clients or classes_per_client"
        )
    rng = np.random.default_rng(seed)
    owned = _dealt(rng, clients, classes_per_client, classes)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for c in range(classes):
        owners = [client for client in rng.permutation(clients) if c in owned[client]]
        members = rng.permutation(np.flatnonzero(labels == c))
        if len(members) < len(owners):
            raise ValueError(
                f"class {c} has {len(members)} examples for {len(owners)} owners; let there be fewer clients or "
                "classes_per_client"
            )
        for owner, part in zip(owners, np.array_split(members, len(owners)), strict=True):
            parts[owner].append(part)
    return _parts([np.concatenate(part) for part in parts], labels, classes)


def dirichlet(
    labels: Any, clients: int, alpha: float, *, seed: int, least: int = 10, num_classes: int | None = None
) -> Partition:
    """Label skew: the shares of the clients in each class are drawn from a Dirichlet distribution.

    Args:
      labels, clients, seed, num_classes: as of `iid`.
      alpha: concentration, above 0; low means that few clients hold most of a class.
      least: examples that every client must have; all is drawn again until they do.

    Raises:
      TypeError, ValueError: as `iid`; for an alpha that is not positive, or if no draw gives every client enough.
    """
    labels, classes = _checked(labels, clients, num_classes)
    _check_alpha(alpha)

    def draw(rng):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c in range(classes):
            members = rng.permutation(np.flatnonzero(labels == c))
            for part, some in zip(parts, _split(members, rng.dirichlet(np.full(clients, alpha))), strict=True):
                part.append(some)
        return [np.concatenate(part) for part in parts]

    return _parts(_drawn(draw, seed, least, clients, len(labels), alpha), labels, classes)


def quantity(
    labels: Any, clients: int, alpha: float, *, seed: int, least: int = 10, num_classes: int | None = None
) -> Partition:
    """Quantity skew: parts that are drawn alike, of sizes drawn from a Dirichlet distribution; arguments as above."""
    labels, classes = _checked(labels, clients, num_classes)
    _check_alpha(alpha)

    def draw(rng):
        return _split(rng.permutation(len(labels)), rng.dirichlet(np.full(clients, alpha)))

    return _parts(_drawn(draw, seed, least, clients, len(labels), alpha), labels, classes)


def by_key(keys: Any, labels: Any, *, num_classes: int | None = None) -> Partition:
    """Natural clients: one for each distinct key, in the order of the keys.

    Args:
      keys: [n], for example the users of MovieLens ratings; anything that sorts.
      labels, num_classes: as of `iid`.

    Raises:
      TypeError, ValueError: as `iid`; if there are not as many keys as labels.
    """
    labels, classes = _checked(labels, 1, num_classes)
    keys = np.asarray(keys)
    if keys.shape != labels.shape:
        raise ValueError(f"keys must be of shape {labels.shape} like the labels, got {keys.shape}")
    _, owner = np.unique(keys, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    return _parts(np.split(order, np.cumsum(np.bincount(owner))[:-1]), labels, classes)


def noise_levels(clients: int, sigma: float) -> np.ndarray:
    """Feature skew: standard deviation of the noise that each client sees, from sigma / N to sigma, float32 [N].

    Raises:
      ValueError: for a negative sigma, or no clients.
    """
    if clients < 1 or sigma < 0:
        raise ValueError(f"clients must be at least 1 and sigma not negative, got {clients} and {sigma}")
    return (sigma * np.arange(1, clients + 1) / clients).astype(np.float32)


def with_noise(key: jax.Array, images: jax.Array, level: float | jax.Array) -> jax.Array:
    """Images with Gaussian noise of this standard deviation; `level` may be one for each image [B].

    Args:
      key: of the draw; the same key gives a client the same noise in every round.
      images: floating point [B, ...], in the units of `level`.
      level: of `noise_levels`.

    Raises:
      TypeError: for images that are not floating point.
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"noise is added to floating-point images, got {images.dtype}; standardise them first")
    shaped = jnp.reshape(level, (-1,) + (1,) * (images.ndim - 1)).astype(images.dtype)
    return images + shaped * jax.random.normal(key, images.shape, images.dtype)


def _checked(labels: Any, clients: int, num_classes: int | None) -> tuple[np.ndarray, int]:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be one number for each example, at least one, got shape {labels.shape}")
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    if not 1 <= clients <= len(labels):
        raise ValueError(f"clients must be in 1..{len(labels)}, as each needs an example, got {clients}")
    return labels, classes


def _check_alpha(alpha: float) -> None:
    if not alpha > 0:
        raise ValueError(f"alpha is the concentration of a Dirichlet distribution and must be positive, got {alpha}")


def _dealt(rng: np.random.Generator, clients: int, each: int, classes: int) -> list[set[int]]:
    """Classes of each client: from shuffled decks of all classes, one after the other, and no class twice."""
    owned: list[set[int]] = []
    deck: list[int] = []
    for _ in range(clients):
        hand = set(deck[:each])
        deck = deck[each:]
        if len(hand) < each:
            fresh = rng.permutation(classes).tolist()
            more = [c for c in fresh if c not in hand][: each - len(hand)]
            hand.update(more)
            deck = [c for c in fresh if c not in more]
        owned.append(hand)
    return [owned[client] for client in rng.permutation(clients)]


def _split(members: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Consecutive parts of these shares."""
    return np.split(members, (np.cumsum(shares)[:-1] * len(members)).round().astype(int))


def _drawn(draw: Callable[..., list[np.ndarray]], seed, least, clients, examples, alpha) -> list[np.ndarray]:
    if least < 0 or least * clients > examples:
        raise ValueError(f"least={least} examples for each of {clients} clients are more than the {examples} there are")
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        parts = draw(rng)
        if min(map(len, parts)) >= least:
            return parts
    raise ValueError(
        f"in {TRIES} draws with alpha={alpha:g} some of the {clients} clients always had fewer than {least} examples; "
        "let alpha be higher, or clients or least lower"
    )


def _parts(parts, labels: np.ndarray, classes: int) -> Partition:
    indices = tuple(np.sort(part) for part in parts)
    return Partition(indices, np.array([np.bincount(labels[part], minlength=classes) for part in indices]))
