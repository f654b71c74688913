"""How far long work is, told while it goes on.

On a terminal that is a bar. Elsewhere, as in a log, it is a line every half minute, with an
estimate of the rest. A process that `call_in_child` has started, whose output nobody sees, writes
it down in a file, and the one that waits for it tells it (`Follower`).
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

from quantline.messages import say

Item = TypeVar("Item")

FILE = "QUANTLINE_PROGRESS"  # in a child's environment: where it writes how far it is
LINE_S = 30.0  # between two lines
WRITE_S = 0.2  # between two writes of a child
REMEMBERED = 64  # steps whose durations count for the estimate
QUICK = 0.1  # of the longest of them: what is quicker was there already
MINUTE = 60
HOUR = 3600
DAY = 86400


def progress(
    items: Iterable[Item], label: str, unit: str, total: int | None = None
) -> Iterator[Item]:
    """Yield items, and tell how many of them are done.

    Args:
        items: What to work on.
        label: What is being done, such as "calibrating".
        unit: What an item is, such as "block".
        total: How many there are; by default as many as `items` says.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counting(label, unit, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def counting(label: str, unit: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that is called with how many more items are done."""
    told = _open(label, unit, total)
    try:
        yield told.advance
    finally:
        told.close()


@contextlib.contextmanager
def at_work(label: str) -> Iterator[None]:
    """Say every half minute that the block is at work, where nothing in it says more."""
    entry = _AtWork(label)
    _speaker.add(entry)
    try:
        yield
    finally:
        _speaker.remove(entry)


def duration(seconds: float) -> str:
    """Return a time in words, such as 45 s, 1 min 20 s, 3 h 5 min or 2 d 4 h."""
    whole = round(seconds)
    for large, small, words in (
        (DAY, HOUR, "{} d {} h"),
        (HOUR, MINUTE, "{} h {} min"),
        (MINUTE, 1, "{} min {} s"),
    ):
        if whole >= large:
            return words.format(whole // large, whole % large // small)
    return f"{whole} s"


class _Told(Protocol):
    """Somewhere where it is told how far something is."""

    def advance(self, count: int) -> None:
        """Note that so many more items are done."""

    def close(self) -> None:
        """Tell no more."""


def _open(label: str, unit: str, total: int | None) -> _Told:
    path = os.environ.get(FILE)
    if path:
        return _Note(Path(path), label, unit, total)
    if sys.stderr.isatty():
        return _Bar(label, unit, total)
    return _Lines(label, unit, total)


class _Entry(Protocol):
    """Something that is open, and can be told of."""

    def line(self) -> str | None:
        """Return how far it is; None if that can be seen."""


class _Speaker:
    """Says every half minute how far that is which was opened last."""

    def __init__(self) -> None:
        self._open: list[_Entry] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def add(self, entry: _Entry) -> None:
        """Begin to tell of an entry; the first one sets the clock."""
        with self._lock:
            self._open.append(entry)
            if len(self._open) == 1:
                self._ended = threading.Event()
                threading.Thread(target=self._speak, args=[self._ended], daemon=True).start()

    def remove(self, entry: _Entry) -> None:
        """Tell of an entry no more."""
        with self._lock:
            if entry in self._open:
                self._open.remove(entry)
            if not self._open:
                self._ended.set()

    def _speak(self, ended: threading.Event) -> None:
        while not ended.wait(LINE_S):
            with self._lock:
                line = self._open[-1].line() if self._open else None
            if line is not None:
                say(line, error=True)


_speaker = _Speaker()


class _AtWork:
    """Something of which nothing is known but when it began."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._since = time.monotonic()

    def line(self) -> str:
        return f"{self._label}: at work for {duration(time.monotonic() - self._since)}"


class _Bar:
    """A bar on a terminal."""

    def __init__(self, label: str, unit: str, total: int | None) -> None:
        self._bar = tqdm(desc=label, unit=unit, total=total)
        _speaker.add(self)

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def close(self) -> None:
        _speaker.remove(self)
        self._bar.close()

    def line(self) -> None:
        return None


class _Lines:
    """A line every half minute."""

    def __init__(self, label: str, unit: str, total: int | None) -> None:
        self._label = label
        self._unit = unit
        self._total = total
        self._done = 0
        self._since = self._last = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)  # of one item each
        _speaker.add(self)

    def advance(self, count: int) -> None:
        now = time.monotonic()
        if count > 0:
            self._seconds.append((now - self._last) / count)
            self._last = now
        self._done += count

    def close(self) -> None:
        _speaker.remove(self)

    def line(self) -> str:
        """Return how far it is, and how long the rest takes."""
        spent = duration(time.monotonic() - self._since)
        of = "" if self._total is None else f" of {self._total}"
        many = self._unit if (self._total or self._done) == 1 else f"{self._unit}s"
        rest = self._rest_s()
        ahead = "" if rest is None else f", about {duration(rest)} left"
        return f"{self._label}: {self._done}{of} {many} in {spent}{ahead}"

    def _rest_s(self) -> float | None:
        """Return the seconds of the rest; None if they cannot be told.

        Items that an earlier run had done pass in no time, and say nothing of those to come.
        """
        seconds = list(self._seconds)
        if self._total is None or not seconds:
            return None
        slow = [one for one in seconds if one >= QUICK * max(seconds)]
        whole = (self._total - self._done) * sum(slow) / len(slow)
        return max(0.0, whole - (time.monotonic() - self._last))


class _Note:
    """A file in which a process writes how far it is."""

    def __init__(self, path: Path, label: str, unit: str, total: int | None) -> None:
        self._path = path
        self._says = {"label": label, "unit": unit, "total": total, "done": 0}
        self._done = 0
        self._written = 0.0
        self._write()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._written > WRITE_S:
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # of a full disk: the work itself will say so
            # Renamed, so that nobody reads half of it; that the disk has it does not matter.
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self._says | {"done": self._done}), encoding="utf-8")
            os.replace(part, self._path)


class Follower:
    """Tells how far a process is, by the file in which it writes that."""

    def __init__(self, path: Path, label: str) -> None:
        """Begin.

        Args:
            path: Where the process writes (FILE).
            label: What the process is called.
        """
        self._path = path
        self._label = label
        self._told: _Told | None = None
        self._now: tuple[str, str, int | None] | None = None
        self._done = 0

    def look(self) -> None:
        """Read how far the process is."""
        try:
            says = json.loads(self._path.read_text(encoding="utf-8"))
            now = (str(says["label"]), str(says["unit"]), says["total"])
            done = int(says["done"])
        except (OSError, ValueError, KeyError, TypeError):  # it has written nothing yet
            return
        if now != self._now or done < self._done:
            self.close()
            self._now = now
            self._done = 0
            self._told = _open(f"{self._label}, {now[0]}", *now[1:])
        assert self._told is not None
        if done > self._done:
            self._told.advance(done - self._done)
            self._done = done

    def close(self) -> None:
        """Tell no more."""
        if self._told is not None:
            self._told.close()
            self._told = None
