"""One run in a project at a time: nothing composes, runs or compares beside another.

DVC locks its own files, but reads params.yaml again while it runs: with new parameters it would
take old results for those of the new ones.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from quantline.errors import BusyError
from quantline.files import write_json

FOLDER = Path(".quantline")
HELD = "QUANTLINE_LOCK"  # in the environment of all that runs inside: the holder and its project


def holder_pid() -> int | None:
    """Return the process that holds the project of the working folder for this one, if any."""
    pid, _, held = os.environ.get(HELD, "").partition(":")
    return int(pid) if held == str(Path.cwd()) and pid.isdecimal() else None


@contextlib.contextmanager
def project_lock(purpose: str, wait_s: float = 0) -> Iterator[None]:
    """Hold the project of the working folder.

    What is started inside may take the lock again, in this process and in its children. The system
    frees it when the process ends, however it ends.

    Args:
        purpose: What it is held for, in words.
        wait_s: For how long to wait for another run.

    Raises:
        BusyError: If another run holds it.
    """
    project = str(Path.cwd())
    pid = holder_pid()
    # The holder may have been killed, while what it started goes on.
    if pid is not None and psutil.pid_exists(pid):
        yield
        return
    FOLDER.mkdir(exist_ok=True)
    lock = FileLock(FOLDER / "lock")
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise BusyError(
            f"expected no other run in {project}, found {_holder()}; wait until it has ended"
        ) from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(FOLDER / "holder.json", {"for": purpose, "pid": os.getpid(), "since": since})
        os.environ[HELD] = f"{os.getpid()}:{project}"
        yield
    finally:
        os.environ.pop(HELD, None)
        lock.release()


def _holder() -> str:
    """Return who holds the lock, so far as it has said so yet."""
    try:
        holder = json.loads((FOLDER / "holder.json").read_text(encoding="utf-8"))
        return f"`{holder['for']}` (process {holder['pid']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "one"
