"""Folders that appear whole or not at all, and those in which a killed run is continued."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quantline.causes import failure_of
from quantline.durable import remove_leftovers, replace_folder, sync, temporary_path
from quantline.errors import Failure
from quantline.files import write_json

# After these the same run goes on once there is room, memory or time again.
CONTINUED = (
    Failure.DISK_FULL,
    Failure.OUT_OF_MEMORY,
    Failure.TIMED_OUT,
    Failure.DISK_ERROR,
    Failure.WORKER_LOST,
)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`.

    It takes the target's name when the block ends well, and vanishes when it does not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    folder = temporary_path(target)
    folder.mkdir()
    try:
        yield folder
        _take_name(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_name(folder: Path, target: Path) -> None:
    """Put a finished folder in the place of the one that has the name now."""
    mode = folder.stat().st_mode & 0o666  # as the user's umask left it
    paths = sorted(folder.rglob("*"), reverse=True)
    for path in paths:
        if path.is_symlink():  # its mode and its bytes are the source's
            continue
        status = path.stat()
        if path.is_file():
            if status.st_nlink > 1:  # a hard link is the source's, too
                continue
            if status.st_mode & 0o777 != mode:  # some writers make private files
                path.chmod(mode)
        sync(path)
    sync(folder)
    if target.exists():
        replace_folder(folder, target)
    else:
        os.rename(folder, target)
    sync(target.parent)


@contextmanager
def resumable_folder(
    target: Path, key: dict[str, Any], announce: Callable[[str], None]
) -> Iterator[Path]:
    """Yield a folder as `atomic_folder` does, in which a killed run is continued.

    What a killed run wrote is there again for the next run with the same key, also after a full
    disk or the like. After another error, or with another key, nothing is kept.

    Args:
        target: The folder to make.
        key: All that the content depends on, as JSON.
        announce: Called with a sentence if an earlier run is continued or dropped.
    """
    remove_leftovers(target)
    folder = target.parent / f".{target.name}.partial"
    # Beside the folder, so that it is there until the folder has its name.
    note = target.parent / f".{target.name}.partial.json"
    before = _read_note(note)
    changed = sorted(name for name in {*before.key, *key} if before.key.get(name) != key.get(name))
    if before.inode is not None and _inode(target) == before.inode:
        # The run was killed after its folder had taken the name; the folder that had it until then
        # may still be there, in the other's place.
        shutil.rmtree(folder, ignore_errors=True)
        if not changed:
            os.rename(target, folder)
    elif folder.is_dir() and not changed and _inode(folder) != before.inode:
        changed = ["the folder"]
    if folder.is_dir():
        if changed:
            announce(f"starts over, because {', '.join(changed)} changed since a run was killed")
            shutil.rmtree(folder)
        else:
            announce("resumes where a killed run stopped")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(folder.rglob(".*")):  # what was being written, or removed
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    write_json(note, _Note(key, _inode(folder))._asdict())
    try:
        yield folder
        _take_name(folder, target)
    except Exception as error:
        # Libraries say in words of their own that the disk is full.
        kept = isinstance(error, OSError | MemoryError) or failure_of(error) in CONTINUED
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
            note.unlink(missing_ok=True)
        raise
    note.unlink()


class _Note(NamedTuple):
    """What a run that was killed says of itself: its key, and the inode of its folder."""

    key: dict[str, Any]
    inode: int | None


def _read_note(path: Path) -> _Note:
    """Return the note of a run that was killed; an empty one where there is none.

    Raises:
        OSError: If there is one that cannot be read now: the work that it tells of is kept.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        note = _Note(values["key"], values["inode"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return _Note({}, None)
    return note if isinstance(note.key, dict) else _Note({}, None)


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None
