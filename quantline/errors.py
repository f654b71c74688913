"""What can go wrong: the closed lists of names, and the exceptions that carry them."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from enum import StrEnum


class Reason(StrEnum):
    """`reason_code` of a run event: which promise was not kept, or which step was taken."""

    STAGE_STARTED = "stage_started"
    STAGE_FINISHED = "stage_finished"
    LOAD_REJECTED = "load_rejected"
    CALIBRATION_FAILED = "calibration_failed"
    REFERENCE_FAILED = "reference_failed"
    EXPORT_QUANTIZATION_FAILED = "export_quantization_failed"
    EXPORT_RUN_FAILED = "export_run_failed"
    EXPORT_ARTIFACT_MISSING = "export_artifact_missing"
    EVAL_RUNTIME_ERROR = "eval_runtime_error"
    EVAL_DATASET_MISSING = "eval_dataset_missing"
    COMPARE_FAILED = "compare_failed"
    RUN_NOT_TRACKED = "run_not_tracked"
    MODEL_REGISTERED = "model_registered"
    MODEL_NOT_REGISTERED = "model_not_registered"
    CONFIG_INVALID = "config_invalid"
    PIPELINE_REFUSED = "pipeline_refused"


class Failure(StrEnum):
    """`payload.failure` of a run event: the cause."""

    UNSAFE_CHECKPOINT = "unsafe_checkpoint"
    CUSTOM_CODE = "custom_code"
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    MISSING_SHARD = "missing_shard"
    MISSING_TOKENIZER = "missing_tokenizer"
    MISSING_FILE = "missing_file"
    NON_FINITE = "non_finite"
    PATH_ESCAPE = "path_escape"
    ADAPTER_MISMATCH = "adapter_mismatch"
    CONVERTER_FAILED = "converter_failed"
    CALIBRATION_EMPTY = "calibration_empty"
    IMPORTANCE_MISSING = "importance_missing"
    IMPORTANCE_INVALID = "importance_invalid"
    TEXTS_OVERLAP = "texts_overlap"
    HESSIAN_NOT_POSITIVE_DEFINITE = "hessian_not_positive_definite"
    WORSE_THAN_ROUND_TO_NEAREST = "worse_than_round_to_nearest"
    UNSUPPORTED_WIDTH = "unsupported_width"
    TYPE_SUBSTITUTED = "type_substituted"
    TOKENIZER_MISMATCH = "tokenizer_mismatch"
    READBACK_MISMATCH = "readback_mismatch"
    SMOKE_FAILED = "smoke_failed"
    ARTIFACT_CHANGED = "artifact_changed"
    STALE = "stale"
    DATASET_INVALID = "dataset_invalid"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    DISK_FULL = "disk_full"
    DISK_ERROR = "disk_error"
    PERMISSION_DENIED = "permission_denied"
    TOO_MANY_OPEN_FILES = "too_many_open_files"
    NAME_TOO_LONG = "name_too_long"
    INTERRUPTED = "interrupted"
    KILLED = "killed"
    RUNTIME_UNAVAILABLE = "runtime_unavailable"
    RUNTIME_CRASHED = "runtime_crashed"
    NETWORK_UNAVAILABLE = "network_unavailable"
    TRACKING_REFUSED = "tracking_refused"
    CONFIG_STALE = "config_stale"
    CONFIG_INVALID = "config_invalid"
    PROJECT_BUSY = "project_busy"
    PIPELINE_REFUSED = "pipeline_refused"
    INTERNAL_ERROR = "internal_error"


REASON_OF_STAGE = {
    "check": Reason.CONFIG_INVALID,
    "load": Reason.LOAD_REJECTED,
    "calibrate": Reason.CALIBRATION_FAILED,
    "answer": Reason.REFERENCE_FAILED,
    "reference": Reason.REFERENCE_FAILED,
    "quantize": Reason.EXPORT_QUANTIZATION_FAILED,
    "export": Reason.EXPORT_RUN_FAILED,
    "smoke": Reason.EXPORT_RUN_FAILED,
    "evaluate": Reason.EVAL_RUNTIME_ERROR,
    "lm_eval": Reason.EVAL_RUNTIME_ERROR,
    "compare": Reason.COMPARE_FAILED,
}

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


class StageError(Exception):
    """A stage cannot go on.

    The message says what was expected, what was found, and what to do next.
    """

    def __init__(self, failure: Failure, message: str, reason: Reason | None = None) -> None:
        """Name the failure; without a reason the stage's own applies (REASON_OF_STAGE)."""
        super().__init__(message)
        self.failure = failure
        self.reason = reason


class ConfigError(Exception):
    """params.yaml or conf/ cannot be used; the message says where, why, and what mends it."""

    failure = Failure.CONFIG_INVALID


class StaleError(ConfigError):
    """conf/ or params.yaml has changed since a stage or a composition read it."""

    failure = Failure.CONFIG_STALE


class BusyError(ConfigError):
    """Another run works in the project."""

    failure = Failure.PROJECT_BUSY


@contextlib.contextmanager
def reading_foreign(failure: Failure, expected: str) -> Iterator[None]:
    """Name what goes wrong in a block, or a function, that reads values of any kind.

    Args:
        failure: The name.
        expected: What was expected, for the message.

    Raises:
        StageError: For whatever has no name of its own.
    """
    try:
        yield
    except (StageError, ConfigError, OSError, MemoryError):
        raise
    except Exception as error:
        raise StageError(
            failure,
            f"expected {expected}, found something else ({type(error).__name__}: {error}); fetch "
            "or save it again",
        ) from error


def pass_on(error: BaseException) -> None:
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
