"""What goes wrong when rows are read: each error names the file, the place in it, and what to do."""

import errno
import os


class ReadError(OSError):
    """The system failed to read.

    Attributes:
      path: the file, also `filename`.
      offset: first byte that could not be read.
    """

    def __init__(self, code: int, path: str, offset: int, detail: str = ""):
        message = f"{path} cannot be read at byte {offset}{detail}: {os.strerror(code)}"
        super().__init__(code, message, path)
        self.path, self.offset = path, offset
        self._made_of: tuple[object, ...] = (code, path, offset, detail)

    def __str__(self) -> str:
        return self.strerror or ""

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._made_of


class ShortRead(ReadError):
    """The file ends before the rows do: it was truncated, or the offsets are another file's."""

    def __init__(self, path: str, offset: int, size: int):
        super().__init__(errno.ENODATA, path, offset)
        self.strerror = (
            f"{path} ends at byte {size}, but rows at byte {offset} were asked for: it was truncated, or the offsets "
            f"are another file's; write it again"
        )
        self._made_of = (path, offset, size)


class DeadlineExceeded(TimeoutError):
    """The deadline came before the last row; what `out` holds then is not to be used.

    Attributes:
      arrived: rows that had been read.
      rows: rows asked for.
    """

    def __init__(self, arrived: int, rows: int, seconds: float):
        super().__init__(
            f"{arrived} of {rows} rows had arrived at the deadline of {seconds:g} s; allow more time, or ask for fewer"
        )
        self.arrived, self.rows = arrived, rows
        self._seconds = seconds

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.arrived, self.rows, self._seconds)
