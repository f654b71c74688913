"""Naming an error that no stage foresaw, by its cause: full disks, missing rights, lack of memory.

Libraries wrap what the system says, or carry it in words alone.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from quantline.errors import ConfigError, Failure, StageError

ADVICE = {
    Failure.OUT_OF_MEMORY: "close other programs, or take fewer or shorter sequences",
    Failure.DISK_FULL: "free some space (`dvc gc --workspace` drops old results), and run it again",
    Failure.DISK_ERROR: "look at the disk (`dmesg`), and run it again on a sound one",
    Failure.PERMISSION_DENIED: "give this user the right to read or write there, and run it again",
    Failure.TOO_MANY_OPEN_FILES: "raise the limit (`ulimit -n 4096`), and run it again",
    Failure.NAME_TOO_LONG: "choose a shorter name or a shorter path",
    Failure.PROJECT_BUSY: "wait until the other run has ended, and run it again",
    Failure.MISSING_FILE: "put the file there, or run `quantline repro`",
}
# Something has the name that is not what was expected there: a file in place of a folder, a folder
# in place of a file, a link that leads to itself.
OF_ANOTHER_KIND = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# What the system says, as a number.
OF_ERRNO = {
    errno.ENOSPC: Failure.DISK_FULL,
    errno.EDQUOT: Failure.DISK_FULL,
    errno.EFBIG: Failure.DISK_FULL,  # of a limit on the size of files (`ulimit -f`), too
    errno.EIO: Failure.DISK_ERROR,
    errno.ESTALE: Failure.DISK_ERROR,
    errno.EACCES: Failure.PERMISSION_DENIED,
    errno.EPERM: Failure.PERMISSION_DENIED,
    errno.EROFS: Failure.PERMISSION_DENIED,
    errno.EMFILE: Failure.TOO_MANY_OPEN_FILES,
    errno.ENFILE: Failure.TOO_MANY_OPEN_FILES,
    errno.ENAMETOOLONG: Failure.NAME_TOO_LONG,
    errno.ENOMEM: Failure.OUT_OF_MEMORY,
    errno.ENOENT: Failure.MISSING_FILE,
    **dict.fromkeys(OF_ANOTHER_KIND, Failure.MISSING_FILE),
}
# Causes that lie with the machine, whatever was read or written when they came up.
OF_MACHINE = frozenset(
    {
        *(Failure.DISK_FULL, Failure.DISK_ERROR, Failure.PERMISSION_DENIED),
        *(Failure.TOO_MANY_OPEN_FILES, Failure.NAME_TOO_LONG, Failure.OUT_OF_MEMORY),
    }
)
# By these the system says that it has no such step here, so that another way is right. After any
# other number another way would hide what happened.
NOT_OFFERED = frozenset(
    {
        *(errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL),
        *(errno.EPERM, errno.EMLINK, errno.ETXTBSY),
        errno.EAGAIN,  # of file systems that cannot share what they have not written yet
    }
)
# What libraries say in words alone: torch and onnxruntime, numpy's `tofile`, sqlite.
OF_WORDS = {
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|bad allocation": (
        Failure.OUT_OF_MEMORY
    ),
    r"failed to allocate memory|unable to allocate": Failure.OUT_OF_MEMORY,
    r"\d+ requested and \d+ written|database or disk is full": Failure.DISK_FULL,
    r"disk i/o error": Failure.DISK_ERROR,
    r"readonly database": Failure.PERMISSION_DENIED,
    r"database is locked": Failure.PROJECT_BUSY,
}
# Rust libraries end a message with the number, Python begins one with it.
NUMBER_IN_WORDS = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]")


def raise_if_of_machine(error: BaseException) -> None:
    """Raise an error again if its cause lies with the machine.

    It is called where an error is about to be taken for a fault of what was read, or for a sign
    that something is absent: a full disk or a lack of memory is neither. Words count only with the
    system's number, for others may quote the file.

    Raises:
        OSError: This very error.
        MemoryError: The same.
        StageError: This very error, or one with the cause's name for an error of a library.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError | MemoryError | StageError):
            failure = _failure_of_one(cause)
        else:
            failure = _failure_by_number(str(cause).lower())
        if failure not in OF_MACHINE:
            continue
        if isinstance(error, OSError | MemoryError | StageError):
            raise error
        message = f"{type(error).__name__}: {error}; {ADVICE[failure]}"
        raise StageError(failure, message) from error


def failure_of(error: BaseException) -> Failure:
    """Name a failure that no stage foresaw.

    Libraries wrap the cause in errors of their own, or carry it in words alone, so the errors that
    led to this one count as well. A file that was not there before is no cause: many look for a
    file, and go on without it.
    """
    for number, cause in enumerate(_causes(error)):
        failure = _failure_of_one(cause)
        if failure is not None and (number == 0 or failure is not Failure.MISSING_FILE):
            return failure
    return Failure.INTERNAL_ERROR


def advice_on(error: BaseException) -> str:
    """Return what to do about an error that no stage foresaw, after a semicolon; "" if unknown."""
    if isinstance(error, OSError) and error.errno in OF_ANOTHER_KIND:
        return "; something of another kind has that name: move it away, and run it again"
    advice = ADVICE.get(failure_of(error))
    return f"; {advice}" if advice else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from or while handling, and so on."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting.append(cause.__cause__)
        if not cause.__suppress_context__:
            waiting.append(cause.__context__)
        if isinstance(cause, BaseExceptionGroup):
            waiting.extend(cause.exceptions)


def _failure_of_one(error: BaseException) -> Failure | None:
    """Name a failure by an error's type, number and words; None if they say nothing."""
    if isinstance(error, StageError | ConfigError):
        return error.failure
    if isinstance(error, MemoryError):
        return Failure.OUT_OF_MEMORY
    if type(error).__name__ == "PanicException":  # of a library in Rust
        return Failure.RUNTIME_CRASHED
    if isinstance(error, OSError) and error.errno in OF_ERRNO:
        return OF_ERRNO[error.errno]
    return _failure_in_words(str(error).lower())


def _failure_by_number(words: str) -> Failure | None:
    """Name a failure by the system's number in a message, in lower case."""
    for found in NUMBER_IN_WORDS.findall(words):
        failure = OF_ERRNO.get(int("".join(found)))
        if failure is not None:
            return failure
    return None


def _failure_in_words(words: str) -> Failure | None:
    """Name a failure by the words of its message, in lower case."""
    failure = _failure_by_number(words)
    if failure is not None:
        return failure
    for number, named in OF_ERRNO.items():
        if os.strerror(number).lower() in words:
            return named
    for pattern, failure in OF_WORDS.items():
        if re.search(pattern, words):
            return failure
    return None


@contextlib.contextmanager
def reading_foreign(failure: Failure, expected: str) -> Iterator[None]:
    """Name what goes wrong in a block, or a function, that reads values of any kind.

    Args:
        failure: The name.
        expected: What was expected, for the message.

    Raises:
        StageError: For whatever has no name of its own, and whose cause is not the machine's.
    """
    try:
        yield
    except (StageError, ConfigError, OSError, MemoryError):
        raise
    except Exception as error:
        raise_if_of_machine(error)
        raise StageError(
            failure,
            f"expected {expected}, found something else ({type(error).__name__}: {error}); fetch "
            "or save it again",
        ) from error
