"""Running hostile inputs: each is refused by name, or harmless, within seconds."""

import contextlib
import json
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantline.causes import failure_of
from quantline.errors import ConfigError, Failure, StageError

SECONDS = 60  # on a busy machine; each takes less than one
HARMLESS = "harmless"


class HangError(Exception):
    """The input was not refused in time."""


@contextlib.contextmanager
def bounded(seconds: int = SECONDS) -> Iterator[None]:
    """Stop what takes longer."""

    def stop(*_: object) -> None:
        raise HangError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(act: Callable[[], Any]) -> str:
    """Return the failure's name of what is refused, as a stage would name it, or HARMLESS.

    What a stage would only call internal_error is raised, for it is a failure without a name.
    """
    try:
        with bounded():
            act()
    except (StageError, ConfigError) as error:
        assert str(error), "a failure says nothing"
        return str(error.failure)
    except HangError:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        failure = failure_of(error)
        if failure is Failure.INTERNAL_ERROR:
            raise
        return str(failure)
    return HARMLESS


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def safetensors_file(header: bytes | dict[str, Any], data: bytes = b"", size: int = -1) -> bytes:
    """Return a file of safetensors with a header of one's own; `size` is what it claims to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size < 0 else size) + text + data
