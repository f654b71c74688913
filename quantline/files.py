"""Files that appear whole or not at all, and the hashes that name their content."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.????????"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    beside.chmod(0o755)
    try:
        yield beside
        _take_name(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _take_name(beside: Path, target: Path) -> None:
    """Put a finished folder in the place of the one that has the name now."""
    for path in beside.rglob("*"):
        # Some writers make private files; a link is left alone, for its mode is the source's.
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(0o644)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        os.rename(target, old / "old")
        os.rename(beside, target)
        shutil.rmtree(old)
    else:
        os.rename(beside, target)


@contextmanager
def resumable_folder(target: Path, key: dict[str, Any], say: Callable[[str], None]) -> Iterator[Path]:
    """As `atomic_folder`, but what a killed run has written is there again for the next run with the same `key`.

    After an error, or with another key, nothing is kept; `say` is told which parts of the key have changed.
    """
    beside, key_file = target.parent / f".{target.name}.partial", "key.json"
    if beside.is_dir():
        try:
            before = json.loads((beside / key_file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        changed = sorted(name for name in {*before, *key} if before.get(name) != key.get(name))
        if changed:
            say(f"does not go on where an earlier run stopped: {', '.join(changed)} changed since")
            shutil.rmtree(beside)
        else:
            say("goes on where an earlier run stopped")
    beside.mkdir(parents=True, exist_ok=True)
    write_json(beside / key_file, key)
    try:
        yield beside
    except Exception:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    (beside / key_file).unlink()
    _take_name(beside, target)


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def as_json(value: Any) -> str:
    """Indented, sorted JSON. Raises ValueError for NaN and infinities, which JSON does not know."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, as_json(value))


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a value's sorted JSON."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {sha256, bytes}} of the named files in a folder."""
    return {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
            for name in sorted(names)}


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, read from the packages' metadata without importing them."""
    found = {}
    for package in sorted(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
