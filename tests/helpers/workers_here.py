"""Workers of the tests: they run in this process, and end when a test says so."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from quantline.config.executor import Executor
from quantline.executor.queue import Queue
from quantline.executor.worker import work
from quantline.executor.workers import Ended


class HereWorker:
    """A worker that has ended by the time it is asked."""

    def __init__(self, end: Ended) -> None:
        self._end = end

    def ended(self) -> Ended:
        return self._end


class HereWorkers:
    """Starts workers, of which each works before the next one starts, or is lost at a claim.

    Attributes:
        queue: What they do.
        lose: Called with the number of a worker: whether it is lost once it has claimed an item;
            None loses it before.
        started: Their names.
    """

    poll_s = 0.0

    def __init__(self, queue: Queue, lose: Callable[[int], bool | None]) -> None:
        self.queue = queue
        self.lose = lose
        self.started: list[str] = []

    def start(self, name: str, place: int) -> HereWorker:
        self.started.append(name)
        lost = self.lose(len(self.started))
        if lost is None:
            return HereWorker(Ended(False, "exit code 1: no such module"))
        if lost:
            self.queue.claim(name)
            return HereWorker(Ended(False, "signal 9"))
        work(str(self.queue.folder), name)
        return HereWorker(Ended(True, "well"))


def use_workers_here(
    monkeypatch: pytest.MonkeyPatch, lose: Callable[[int], bool | None]
) -> list[HereWorkers]:
    """Have run_items use HereWorkers; return a list that gets those that are used."""
    used: list[HereWorkers] = []

    @contextlib.contextmanager
    def start(executor: Executor, queue: Queue) -> Iterator[HereWorkers]:
        used.append(HereWorkers(queue, lose))
        yield used[-1]

    monkeypatch.setattr("quantline.executor.run_items.start_workers", start)
    return used
