"""Values that stop being finite: noticed before they are saved, and named."""

from __future__ import annotations

from typing import Any

import jax

from jaxeff import trees
from jaxeff.training.checkpoint import Checkpoints


class NonFiniteLoss(FloatingPointError):
    """The loss or the state became NaN or infinite.

    Attributes:
      step: number of the step that did it, counted from 1.
      last_good: step of the newest checkpoint, whose values are all finite; None when there is none.
    """

    def __init__(self, message: str, step: int, last_good: int | None):
        super().__init__(message)
        self.step = step
        self.last_good = last_good


class FiniteWatch:
    """Notices leaves of the state that were finite when the run began and are not any more.

    Leaves that hold infinities from the beginning (masks, best-so-far values) are the method's business.

    Args:
      state: pytree of arrays at the beginning.
    """

    def __init__(self, state: Any):
        self._before = _finite_leaves(state)

    def broken(self, state: Any) -> str | None:
        """Returns the name of the first such leaf, None when there is none; waits for the device.

        Args:
          state: pytree of the same structure.
        """
        before, now = jax.device_get((self._before, _finite_leaves(state)))
        names = trees.paths(state)
        return next((name for name, a, b in zip(names, before, now, strict=True) if a and not b), None)


@jax.jit
def _finite_leaves(state: Any) -> list[jax.Array]:
    return [trees.all_finite(leaf) for leaf in jax.tree.leaves(state)]


def non_finite(what: str, step: int, checkpoints: Checkpoints | None) -> NonFiniteLoss:
    """Returns the error that names the step and the newest checkpoint before it.

    Args:
      what: what was seen where.
      step: number of the step, counted from 1.
      checkpoints: those of the run; a save in progress is waited for. None when the run keeps none.
    """
    good = None
    if checkpoints is None:
        kept = "nothing was saved, because there is no workdir"
    else:
        checkpoints.wait()
        good = checkpoints.latest()
        kept = "there is no checkpoint before it"
        if good is not None:
            kept = f"the last good checkpoint is step {good} in {checkpoints.directory / str(good)}"
    return NonFiniteLoss(
        f"{what}; {kept}. The batch of step {step} is the first of batches_from({step - 1}). "
        "Try a lower learning rate, a longer warm-up or gradient clipping",
        step,
        good,
    )
