"""What makes a file or a folder appear whole, and stay, also if the power goes.

A rename shows the old or the new, but what a file holds reaches the disk later than its name,
unless one waits for it.
"""

import ctypes
import glob
import os
import secrets
import shutil
from pathlib import Path

from quantline.causes import NOT_OFFERED

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # of linux/fs.h
SUFFIX_BYTES = 4  # of a temporary name, as twice as many characters


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(target: Path) -> Path:
    """Return an unused name beside a file or folder, which `remove_leftovers` knows."""
    return target.with_name(f".{target.name}.{secrets.token_hex(SUFFIX_BYTES)}")


def remove_leftovers(target: Path) -> None:
    """Remove what runs that were killed left beside a file or folder.

    Where the folder itself had been put aside, and nothing has its name yet, it is put back.
    """
    pattern = f".{glob.escape(target.name)}.{'[0-9a-f]' * 2 * SUFFIX_BYTES}"
    for leftover in target.parent.glob(pattern):
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink(missing_ok=True)
            continue
        if (leftover / "old").is_dir() and not target.exists():
            os.rename(leftover / "old", target)
        shutil.rmtree(leftover, ignore_errors=True)


def replace_folder(folder: Path, target: Path) -> None:
    """Give a folder the name of another, which changes places with it where the system can.

    There is a moment without a folder of that name where it cannot; `remove_leftovers` puts the
    old one back if the process ends in it. The old one is removed at the end.
    """
    if _exchange(folder, target):
        shutil.rmtree(folder)
        return
    aside = temporary_path(target)
    aside.mkdir()
    os.rename(target, aside / "old")
    os.rename(folder, target)
    shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step; return whether the file system can.

    Raises:
        OSError: If it can, and something else is in the way.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number not in NOT_OFFERED:
        raise OSError(number, os.strerror(number), str(first), None, str(second))
    return False
