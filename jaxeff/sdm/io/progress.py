"""What a finished read means: how far it got, or which error it is."""

import errno
import os

from jaxeff.sdm.io.errors import ReadError, ShortRead
from jaxeff.sdm.io.files import Files

# A read that gets nowhere, but without an error, is given up after so many times. [ours]
PATIENCE = 1000
AGAIN = (errno.EAGAIN, errno.EINTR)


def progress(files: Files, file: int, offset: int, need: int, result: int, tries: int) -> int:
    """Judges a read that did not bring all that was needed.

    Args:
      files: open files.
      file: which of them.
      offset: where the read started.
      need: bytes that were needed from there.
      result: bytes that came, or minus an error number.
      tries: reads of this place so far that got nowhere.

    Returns:
      Bytes by which to go on; 0 to ask for the same again. Direct reading goes on at a block.

    Raises:
      ShortRead: at the end of the file.
      ReadError: for any error but that the call is to be made again, and for too many of those.
    """
    path = files.paths[file]
    if result < 0 and -result not in AGAIN:
        raise ReadError(-result, path, offset)
    came = max(result, 0)
    step = came // files.block * files.block if files.direct else came
    if step:
        return step
    if result >= 0 and (size := os.fstat(files.descriptors[file]).st_size) < offset + need:
        raise ShortRead(path, offset, size)
    if tries >= PATIENCE:
        raise ReadError(-result or errno.EIO, path, offset, f", given up after {PATIENCE} tries")
    return 0
