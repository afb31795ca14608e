"""What XLA itself says about the compiled function, to hold beside our count."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxeff.costs.report import CostReport, aligned, in_bytes


@dataclasses.dataclass(frozen=True)
class CompiledCost:
    """XLA's cost and memory analysis of one compiled call; None where the backend does not say.

    Attributes:
      flops: floating point operations; a multiply-accumulate is two, and elementwise work is included. Loop bodies
        count once.
      bytes_accessed: bytes that its operations read and write, each time they do.
      argument_bytes: bytes of the arguments.
      output_bytes: bytes of the results.
      temp_bytes: bytes of the buffers that live only during the call.
      peak_bytes: largest number of bytes alive at once.
      generated_code_bytes: bytes of machine code.
    """

    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    generated_code_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)

    def beside(self, report: CostReport) -> str:
        """Returns a plain-text table of a report's totals beside XLA's numbers.

        Args:
          report: the analysis of the same function.
        """
        total = report.total
        rows = [
            ("", "jaxpr", "XLA"),
            ("flops", f"{2 * total.macs:,}", "-" if self.flops is None else f"{self.flops:,.0f}"),
            ("bytes moved", in_bytes(total.moved_bytes), in_bytes(self.bytes_accessed)),
            ("residuals", in_bytes(total.residual_bytes), "-"),
            ("arguments", "-", in_bytes(self.argument_bytes)),
            ("results", "-", in_bytes(self.output_bytes)),
            ("temporaries", "-", in_bytes(self.temp_bytes)),
            ("peak", "-", in_bytes(self.peak_bytes)),
            ("machine code", "-", in_bytes(self.generated_code_bytes)),
        ]
        return "\n".join(aligned(rows))


def compiled(fn: Callable[..., Any], *args: Any) -> CompiledCost:
    """Compiles a function, without running it, and reads XLA's own analyses.

    Args:
      fn: a function of arrays; a jitted one keeps its options (donation, shardings).
      *args: its arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Flops and bytes as far as the backend reports them.

    Raises:
      TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of arrays, got {type(fn).__name__}")
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    executable = jitted.lower(*args).compile()
    costs = executable.cost_analysis() or {}
    memory = executable.memory_analysis()
    return CompiledCost(
        flops=_known(costs.get("flops")),
        bytes_accessed=_known(costs.get("bytes accessed")),
        argument_bytes=_known(getattr(memory, "argument_size_in_bytes", None)),
        output_bytes=_known(getattr(memory, "output_size_in_bytes", None)),
        temp_bytes=_known(getattr(memory, "temp_size_in_bytes", None)),
        peak_bytes=_known(getattr(memory, "peak_memory_in_bytes", None)),
        generated_code_bytes=_known(getattr(memory, "generated_code_size_in_bytes", None)),
    )


def _known(number: Any) -> Any:
    """Backends say -1 for what they do not know."""
    return None if number is None or number < 0 else number
