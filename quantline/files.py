"""Files that appear whole or not at all, the hashes that name their content, and JSON."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.causes import failure_of
from quantline.durable import remove_leftovers, sync, temporary_path
from quantline.errors import Failure, Reason, StageError

if TYPE_CHECKING:
    import numpy as np

MIB = 2**20
CHECK_FILE = "check the path; if quantline makes the file, run `dvc repro`"
_KNOWN: dict[tuple[int, ...], str] = {}  # identity of a file → sha256


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path`, then rename it.

    The file is on the disk before it has its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def as_json(value: Any) -> str:
    """Return indented, sorted JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, as_json(value))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StageError: missing_file, if the file is not there or holds no JSON object.
    """
    return _read_json(path, dict, "object")


def read_json_list(path: Path) -> list[Any]:
    """Read a JSON array.

    Raises:
        StageError: missing_file, if the file is not there or holds no JSON array.
    """
    return _read_json(path, list, "array")


def _read_json(path: Path, kind: type, name: str) -> Any:
    """Read a JSON value of one kind, which has a name in JSON."""
    expected = f"expected a JSON {name} in {path}"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(failure_of(error), f"{expected}: {error}; {CHECK_FILE}") from error
    except (ValueError, RecursionError) as error:
        raise StageError(Failure.MISSING_FILE, f"{expected}: {error}; {CHECK_FILE}") from error
    if not isinstance(value, kind):
        found = type(value).__name__
        raise StageError(Failure.MISSING_FILE, f"{expected}, found {found}; {CHECK_FILE}")
    return value


def check_made(
    path: Path, stage: str, reason: Reason | None = None, what: str | None = None
) -> None:
    """Check that a file is there which a stage makes.

    Args:
        path: The file.
        stage: As DVC calls it.
        reason: Of the failure; by default that of the stage that runs.
        what: The file in words, before its path.

    Raises:
        StageError: missing_file.
    """
    if not path.is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected {f'{what} in ' if what else ''}{path}, found nothing; run "
            f"`dvc repro {stage}`",
            reason,
        )


def write_tensors(
    path: Path, tensors: "Mapping[str, np.ndarray]", metadata: dict[str, str] | None = None
) -> None:
    """Write arrays as a safetensors file, each in C order.

    safetensors writes an array's memory as it lies, so that one that is transposed, or in Fortran's
    order, would read back with its numbers in other places. The file is on the disk at the end.
    """
    import numpy as np
    from safetensors.numpy import save_file

    save_file(
        {name: np.asarray(values, order="C") for name, values in tensors.items()}, path, metadata
    )
    sync(path)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Return the sha256 of a file, hashed once in the life of the process.

    It is hashed again if its inode, its size or one of its times is another.
    """
    status = path.stat()
    key = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    if key not in _KNOWN:
        _KNOWN[key] = sha256_file(path)
    return _KNOWN[key]


def sha256_json(value: Any) -> str:
    """Return the sha256 of a value's sorted JSON in hexadecimal."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()


def sha256_files(folder: Path, paths: Iterable[Path]) -> str:
    """Return the sha256 over the names and bytes of files in a folder, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return {name: {sha256, bytes}} of the named files in a folder."""
    return {
        name: {"sha256": known_sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in sorted(names)
    }


def stamp(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Return {name: [bytes, time of change in ns]}, which shows that a file was replaced."""
    found = {}
    for path in sorted(set(paths)):
        status = path.stat()
        found[path.name] = [status.st_size, status.st_mtime_ns]
    return found


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Return the size of the files below a folder whose names match `pattern`."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def versions(*packages: str) -> dict[str, str]:
    """Return installed versions from the packages' metadata, without importing the packages."""
    found = {}
    for package in sorted(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
