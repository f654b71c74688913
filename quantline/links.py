"""Sharing a file's bytes instead of copying them."""

import fcntl
import os
import shutil
from pathlib import Path

from quantline.causes import NOT_OFFERED

FICLONE = 0x40049409  # ioctl of linux/fs.h that shares a file's blocks until one side writes
COPY_BYTES = 1 << 24


def clone(source: Path, target: Path) -> bool:
    """Make `target` share the blocks of `source` (a reflink); return whether that is possible here.

    Writing to one file leaves the other alone.

    Raises:
        OSError: If the source cannot be read or the target cannot be written.
    """
    with source.open("rb") as read, target.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), FICLONE, read.fileno())
            return True
        except OSError as error:
            target.unlink()
            if error.errno not in NOT_OFFERED:
                raise
    return False


def clone_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`, shared where the file system can.

    Never by a hard link: DVC makes what it caches read-only, and under a hard link that would be
    the user's own file.
    """
    if not clone(source, target):
        with source.open("rb") as read, target.open("wb") as write:
            shutil.copyfileobj(read, write, COPY_BYTES)


def link(source: Path, target: Path) -> str:
    """Give `target` the bytes of `source`; return how: "reflink", "hard link" or "copy".

    A hard link is the same file under two names, so the manifest's hashes are what notices a
    source that is changed in place.

    Raises:
        OSError: If the source cannot be read or the target cannot be written.
    """
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if clone(source, target):
        return "reflink"
    try:
        os.link(source, target)
        return "hard link"
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    shutil.copyfile(source, target)
    return "copy"
