"""Causes that libraries wrap, or carry in words alone, are named; each error is the true one."""

import errno
import os
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantline.causes import (
    ADVICE,
    OF_ANOTHER_KIND,
    OF_ERRNO,
    OF_MACHINE,
    advice_on,
    failure_of,
    raise_if_of_machine,
    reading_foreign,
)
from quantline.errors import ConfigError, Failure, StageError
from tests.helpers.full_disk import largest_file

FULL = Path("/dev/full")  # a device that is always full


def error_of(call: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def numpy_on_a_full_disk(folder: Path) -> None:
    with FULL.open("wb") as file:
        np.zeros(100_000).tofile(file)


def numpy_writes_short(folder: Path) -> None:
    with largest_file(1 << 16), (folder / "x").open("wb") as file:
        np.zeros(100_000).tofile(file)


def safetensors_beyond_the_limit(folder: Path) -> None:
    with largest_file(1 << 16):
        save_file({"x": np.zeros(100_000)}, folder / "x")


def safetensors_without_a_folder(folder: Path) -> None:
    save_file({"x": np.zeros(1)}, folder / "none" / "x")


def python_on_a_full_disk(folder: Path) -> None:
    FULL.write_bytes(b"x")


def name_too_long(folder: Path) -> None:
    (folder / ("x" * 300)).write_bytes(b"x")


def too_many_open_files(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    files = []
    try:
        while True:
            files.append((folder / "x").open("wb"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()


def numpy_without_memory(folder: Path) -> None:
    np.zeros(1 << 58, np.uint8)


def torch_without_memory(folder: Path) -> None:
    import torch

    torch.zeros(1 << 58, dtype=torch.uint8)


def database(folder: Path, *statements: str, options: str = "") -> None:
    from sqlalchemy import create_engine, text

    engine = create_engine(f"sqlite:///file:{folder}/x.db?uri=true&timeout=0{options}")
    try:
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
    finally:
        engine.dispose()


def database_on_a_full_disk(folder: Path) -> None:
    database(
        folder,
        "PRAGMA max_page_count=3",
        "CREATE TABLE x (y)",
        "INSERT INTO x VALUES (zeroblob(1000000))",
    )


def database_that_is_locked(folder: Path) -> None:
    holder = sqlite3.connect(folder / "x.db")
    try:
        holder.execute("BEGIN EXCLUSIVE")
        database(folder, "CREATE TABLE x (y)")
    finally:
        holder.close()


def database_that_is_read_only(folder: Path) -> None:
    sqlite3.connect(folder / "x.db").execute("CREATE TABLE z (y)")
    database(folder, "CREATE TABLE x (y)", options="&mode=ro")


def rust_panics(folder: Path) -> None:
    class PanicException(BaseException):
        """What pyo3 raises; it cannot be imported."""

    raise PanicException("called `Option::unwrap()` on a `None` value")


@pytest.mark.parametrize(
    ("call", "failure"),
    [
        (numpy_on_a_full_disk, Failure.DISK_FULL),
        (numpy_writes_short, Failure.DISK_FULL),
        (safetensors_beyond_the_limit, Failure.DISK_FULL),
        (safetensors_without_a_folder, Failure.MISSING_FILE),
        (python_on_a_full_disk, Failure.DISK_FULL),
        (name_too_long, Failure.NAME_TOO_LONG),
        (too_many_open_files, Failure.TOO_MANY_OPEN_FILES),
        (numpy_without_memory, Failure.OUT_OF_MEMORY),
        (torch_without_memory, Failure.OUT_OF_MEMORY),
        (database_on_a_full_disk, Failure.DISK_FULL),
        (database_that_is_locked, Failure.PROJECT_BUSY),
        (database_that_is_read_only, Failure.PERMISSION_DENIED),
        (rust_panics, Failure.RUNTIME_CRASHED),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_failure_of_names_what_libraries_say(call, failure, tmp_path):
    assert failure_of(error_of(lambda: call(tmp_path))) == failure


@pytest.mark.parametrize(("number", "failure"), OF_ERRNO.items())
def test_failure_of_finds_a_systems_number_as_a_number_and_in_words(number, failure):
    assert failure_of(OSError(number, os.strerror(number))) == failure
    assert failure_of(RuntimeError(f"I/O error: x (os error {number})")) == failure
    assert failure_of(RuntimeError(f"it failed: {OSError(number, 'x')}")) == failure
    assert failure_of(RuntimeError(f"while writing: {os.strerror(number)}")) == failure


@pytest.mark.parametrize("number", OF_ANOTHER_KIND)
def test_advice_on_a_name_that_something_else_has_is_not_to_put_it_there(number):
    error = OSError(number, os.strerror(number))
    assert failure_of(error) == Failure.MISSING_FILE
    assert "move it away" in advice_on(error)
    assert advice_on(OSError(errno.ENOENT, "gone")) == f"; {ADVICE[Failure.MISSING_FILE]}"
    assert advice_on(ValueError("no idea")) == ""


def raised(error: BaseException, cause: BaseException, how: str) -> BaseException:
    """Return an error that was raised because of, or while handling, or in place of another."""
    try:
        try:
            raise cause
        except BaseException as caught:
            if how == "from":
                raise error from caught
            if how == "from None":
                raise error from None
            raise error  # noqa: B904
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        ("from", Failure.DISK_FULL),
        ("while", Failure.DISK_FULL),
        ("from None", Failure.INTERNAL_ERROR),
    ],
)
def test_failure_of_looks_at_what_led_to_an_error(how, failure):
    full = raised(RuntimeError("a"), OSError(errno.ENOSPC, "full"), "from")
    assert failure_of(raised(ValueError("b"), full, how)) == failure
    assert failure_of(ExceptionGroup("c", [KeyError("d"), raised(ValueError(), full, how)])) == (
        failure
    )


def test_failure_of_takes_no_file_that_was_looked_for_as_a_cause():
    found = raised(ZeroDivisionError("a bug"), FileNotFoundError(errno.ENOENT, "none"), "while")
    assert failure_of(found) == Failure.INTERNAL_ERROR


@pytest.mark.parametrize("error", [StageError(Failure.NON_FINITE, "x"), ConfigError("x")])
def test_failure_of_keeps_the_name_of_an_error_that_a_library_wraps(error):
    assert failure_of(raised(RuntimeError("in a callback"), error, "from")) == error.failure


def test_failure_of_survives_an_error_that_leads_to_itself():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert failure_of(first) == Failure.INTERNAL_ERROR


def test_every_failure_that_the_system_names_has_advice():
    assert set(OF_ERRNO.values()) <= set(ADVICE)


@pytest.mark.parametrize(("number", "failure"), OF_ERRNO.items())
def test_raise_if_of_machine_raises_the_machines_faults_alone(number, failure):
    system = OSError(number, os.strerror(number))
    of_rust = Exception(f"a library's own error (os error {number})")
    wrapped = raised(RuntimeError("cannot load"), system, "from")
    if failure not in OF_MACHINE:
        for error in (system, of_rust, wrapped):
            raise_if_of_machine(error)
        return
    assert error_of(lambda: raise_if_of_machine(system)) is system
    for error in (of_rust, wrapped):
        named = error_of(lambda error=error: raise_if_of_machine(error))
        assert isinstance(named, StageError)
        assert named.failure == failure
        assert str(error) in str(named)
        assert ADVICE[failure] in str(named)


def test_raise_if_of_machine_takes_no_words_that_a_file_may_hold_for_a_cause():
    words = "expected a name, found 'No space left on device, out of memory'"
    raise_if_of_machine(ValueError(words))


@pytest.mark.parametrize("error", [MemoryError(), StageError(Failure.DISK_FULL, "full")])
def test_raise_if_of_machine_raises_an_error_that_has_a_name_already(error):
    assert error_of(lambda: raise_if_of_machine(error)) is error


def test_reading_foreign_names_all_but_the_machines_faults():
    def read(error: Exception) -> None:
        with reading_foreign(Failure.ADAPTER_MISMATCH, "an adapter"):
            raise error

    named = error_of(lambda: read(TypeError("a list")))
    assert isinstance(named, StageError)
    assert named.failure == Failure.ADAPTER_MISMATCH
    of_rust = Exception(f"cannot open (os error {errno.EMFILE})")
    assert error_of(lambda: read(of_rust)).failure == Failure.TOO_MANY_OPEN_FILES
