"""What an analysis found: one row per layer, their total, and the ways to print them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

OUTSIDE = "(outside)"
INPUTS = "(inputs)"
UNUSED = "(unused)"


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    Attributes:
      name: its path, "block/conv"; "(outside)" for operations outside every scope, "(unused)" for parameters that no
        operation reads, "(inputs)" for arguments that reverse mode keeps.
      macs: multiply-accumulates of convolutions and matrix products.
      params: number of parameters (elements, not bytes).
      activation_bytes: bytes of the values that leave the layer.
      residual_bytes: bytes that reverse mode keeps of this layer until the backward pass; None when it was not asked
        for.
      moved_bytes: bytes that must be read and written when the layer is one perfect fusion.
    """

    name: str
    macs: int = 0
    params: int = 0
    activation_bytes: int = 0
    residual_bytes: int | None = 0
    moved_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class CostReport:
    """The costs of a function, layer by layer.

    Attributes:
      rows: the layers in the order in which they first appear.
      total: their sum.
      convention: "paper" or "xla", how the taps of convolutions were counted.
      notes: sentences about what could not be counted exactly; empty when everything could.
    """

    rows: tuple[LayerCost, ...]
    total: LayerCost
    convention: str
    notes: tuple[str, ...] = ()

    def layer(self, name: str) -> LayerCost:
        """Returns the row of one layer.

        Args:
          name: the name in the table.

        Raises:
          ValueError: there is no such layer; the message lists those there are.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"no layer is called {name!r}; the layers are: {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dictionaries, lists, strings and integers, ready for JSON."""
        return {
            "convention": self.convention,
            "layers": [dataclasses.asdict(row) for row in self.rows],
            "total": dataclasses.asdict(self.total),
            "notes": list(self.notes),
        }

    def table(self) -> Any:
        """Returns the report as a `rich.table.Table`.

        Raises:
          ImportError: rich is not installed.
        """
        try:
            from rich.table import Table
            from rich.text import Text
        except ImportError as error:
            message = 'CostReport.table() needs rich: pip install "jaxeff[train]"; str(report) needs nothing'
            raise ImportError(message) from error
        table = Table(title=f"Costs ({self.convention} convention)", caption=Text("\n".join(self.notes)))
        header, *body = self._cells()
        table.add_column(header[0])
        for column in header[1:]:
            table.add_column(column, justify="right")
        for cells in body[:-1]:
            table.add_row(*map(Text, cells))
        table.add_section()
        table.add_row(*map(Text, body[-1]), style="bold")
        return table

    def __str__(self) -> str:
        *lines, total = aligned(self._cells())
        rule = "-" * max(map(len, [*lines, total]))
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([f"costs, {self.convention} convention", *lines, rule, total, *notes])

    def _cells(self) -> list[tuple[str, ...]]:
        header = ("layer", "MACs", "params", "activations", "residuals", "moved")
        return [
            header,
            *(
                (
                    row.name,
                    f"{row.macs:,}",
                    f"{row.params:,}",
                    in_bytes(row.activation_bytes),
                    in_bytes(row.residual_bytes),
                    in_bytes(row.moved_bytes),
                )
                for row in [*self.rows, self.total]
            ),
        ]


def in_bytes(count: int | float | None) -> str:
    """Formats a number of bytes for people, in binary units; "-" for None."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats rows of cells as lines with equal columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
