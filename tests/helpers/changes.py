"""Changing one thing of a project and putting it back: a byte, a file, a number of a JSON file."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quantline.config.params import Params
from quantline.config.validation import validate
from quantline.errors import ConfigError

Edit = Callable[[bytes], bytes | None]


class Change(NamedTuple):
    """One change of one file.

    Attributes:
        path: Of the file.
        what: Is done to it, in words.
        edit: Returns the new bytes for the old; None removes the file.
    """

    path: Path
    what: str
    edit: Edit

    def __str__(self) -> str:
        """Say what is done to which file."""
        return f"{self.path}: {self.what}"


def flipped(data: bytes, position: int) -> bytes:
    """Return bytes of which one has another lowest bit."""
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def flip_one_byte(path: Path) -> None:
    """Change a file behind everyone's back: its size and its times stay."""
    before = path.stat()
    data = path.read_bytes()
    path.unlink()  # it may be a link to what other tests use
    path.write_bytes(flipped(data, len(data) // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def byte_changes(path: Path, other: Path | None = None) -> Iterator[Change]:
    """Yield the changes that any file can suffer.

    Args:
        path: Of the file.
        other: A file of the same kind whose bytes can take its place.
    """
    data = path.read_bytes()
    if data:
        yield Change(path, "the first byte flipped", lambda data: flipped(data, 0))
        yield Change(path, "a byte flipped", lambda data: flipped(data, len(data) // 2))
        yield Change(path, "the last byte flipped", lambda data: flipped(data, -1))
        yield Change(path, "truncated", lambda data: data[: len(data) // 2])
        yield Change(path, "emptied", lambda data: b"")
    yield Change(path, "a byte longer", lambda data: data + b"x")
    yield Change(path, "removed", lambda data: None)
    if other is not None and other.read_bytes() != data:
        yield Change(path, f"with the bytes of {other}", lambda data: other.read_bytes())


def leaf_changes(path: Path) -> Iterator[Change]:
    """Yield a change of each number, text and truth value of a JSON file."""
    for place in leaves(json.loads(path.read_text())):
        yield Change(path, f"another {'.'.join(map(str, place))}", _leaf_edit(place))


def leaves(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each value of a JSON document that holds no others."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from ((key, *rest) for rest in leaves(inner))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from ((number, *rest) for rest in leaves(inner))
    else:
        yield ()


def _leaf_edit(place: tuple[Any, ...]) -> Edit:
    def edit(data: bytes) -> bytes:
        document = {"whole": json.loads(data)}
        target: Any = document
        for key in ("whole", *place)[:-1]:
            target = target[key]
        last = ("whole", *place)[-1]
        target[last] = _other_leaf(target[last])
        return (json.dumps(document["whole"], indent=2, sort_keys=True) + "\n").encode()

    return edit


def _other_leaf(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "0"
    return 0


@contextmanager
def applied(change: Change, aside: Path) -> Iterator[None]:
    """Apply a change; the times of the file stay. Afterwards the same file is back.

    Args:
        change: Of a file that need not exist.
        aside: Where the file is kept meanwhile, on the same disk.
    """
    path = change.path
    existed = path.exists()
    data = path.read_bytes() if existed else b""
    new = change.edit(data)
    assert new != data or not existed, f"{change} changes nothing"
    if existed:
        status = path.stat()
        path.rename(aside)
    try:
        if new is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(new)
            if existed:
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        yield
    finally:
        path.unlink(missing_ok=True)
        if existed:
            aside.rename(path)


@contextmanager
def swapped(first: Path, second: Path) -> Iterator[None]:
    """Let two files or folders trade places, and put them back."""
    aside = first.with_name(first.name + ".aside")

    def swap() -> None:
        first.rename(aside)
        second.rename(first)
        aside.rename(second)

    swap()
    try:
        yield
    finally:
        swap()


def other_values(value: Any) -> Iterator[Any]:
    """Yield values of a parameter that may be valid in place of one."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
        yield value * 2
        yield value / 2
    elif isinstance(value, list):
        yield value[:-1]
        yield [0.0, 0.5]
        yield [*value, "more"]
    elif value is None:
        yield from (1, 0.5, "x", "Q6_K", True)
    else:
        yield from ("minmax", "fail", "numba", "ggml", "Q6_K", "onnxruntime", "mine/other")


def with_another(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return parameters with a value under a dotted key."""
    edited = copy.deepcopy(values)
    target: Any = edited
    *parents, last = key.split(".")
    for name in parents:
        target = target[name]
    target[last] = value
    return edited


def changed(values: dict[str, Any], key: str) -> Params | None:
    """Return parameters with another value under a dotted key; None if no other is valid."""
    present: Any = values
    for name in key.split("."):
        present = present.get(name) if isinstance(present, dict) else None
    for value in other_values(present):
        if value == present:
            continue
        try:
            return validate(with_another(values, key, value))
        except ConfigError:
            continue
    return None
