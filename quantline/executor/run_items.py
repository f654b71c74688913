"""Having workers do the items of a stage, however often one of them is lost."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import sleep

from quantline.config.executor import Executor
from quantline.errors import Failure, StageError
from quantline.executor.item import Item
from quantline.executor.queue import Queue
from quantline.executor.workers import Ended, Worker, Workers, start_workers
from quantline.run.answers import result_of
from quantline.run.progress import counting

FOLDER = "items"  # of a stage's folder, while its items are done


def run_items(
    executor: Executor,
    items: Sequence[Item],
    folder: Path,
    take: Callable[[Item, Path], None],
    label: str,
    unit: str,
) -> None:
    """Have workers do items; those that are lost with their worker are done again.

    Args:
        executor: Who works.
        items: What is to be done, in the order in which it is given out.
        folder: Of the stage's result. What was done when a run is killed is there for the next.
        take: take(item, folder) moves an item's result out of the folder it was made in. The order
            of calls is that in which items are finished.
        label: What is being done, for the progress.
        unit: What an item is, such as "block".

    Raises:
        StageError: The failure of the first item that has one; worker_lost, for an item whose
            workers were lost executor.attempts times, or if workers do not start;
            runtime_unavailable and config_invalid, as what starts the workers does.
    """
    if not items:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of a run that was killed at its end
        return
    queue = Queue.begin(folder / FOLDER, items, executor.gpus)
    by_id = {item.id: item for item in items}
    pending = dict.fromkeys(queue.order)
    with (
        start_workers(executor, queue) as workers,
        counting(label, unit, len(pending)) as advance,
    ):
        crew = Crew(executor, queue, workers, by_id)
        while pending:
            for item_id in list(pending):
                made = queue.result(item_id)
                if made is not None:
                    take(by_id[item_id], made)
                    del pending[item_id]
                    crew.progressed()
                    advance(1)
            first = next(iter(pending), None)
            if first is not None:
                if queue.failed(first):
                    result_of(queue.failure(first))
                crew.look(pending)
                sleep(workers.poll_s)
    queue.remove()


class Crew:
    """The workers that are there, one for each place; who is lost is replaced."""

    def __init__(
        self, executor: Executor, queue: Queue, workers: Workers, items: dict[str, Item]
    ) -> None:
        """Start nobody yet.

        Args:
            executor: How many, and how often an item is tried.
            queue: What they do.
            workers: Starts them.
            items: By their ids.
        """
        self._executor = executor
        self._queue = queue
        self._workers = workers
        self._items = items
        self._places: list[tuple[str, Worker] | None] = [None] * executor.workers
        self._started = 0
        self._losses: Counter[str] = Counter()
        self._fruitless = 0  # workers lost one after the other without any result

    def progressed(self) -> None:
        """Know that a result came."""
        self._fruitless = 0

    def look(self, pending: dict[str, None]) -> None:
        """See who has ended, take back what they lost, and start as many as there is work for.

        Raises:
            StageError: worker_lost.
        """
        for place, entry in enumerate(self._places):
            if entry is None:
                continue
            name, worker = entry
            ended = worker.ended()
            if ended is None:
                continue
            self._places[place] = None
            lost = self._queue.release(name, pending)
            if not ended.well:
                self._count(lost, ended)
        free = len(self._queue.unclaimed(pending))
        # Those that run and have claimed nothing yet take theirs first.
        waiting = sum(entry is not None for entry in self._places)
        waiting -= self._queue.claimed(pending)
        for place, entry in enumerate(self._places):
            if entry is None and waiting < free:
                self._places[place] = self._start(place)
                waiting += 1

    def _start(self, place: int) -> tuple[str, Worker]:
        name = f"worker-{self._started:04d}"
        self._started += 1
        self._queue.add_worker(name)
        return name, self._workers.start(name, place)

    def _count(self, lost: list[str], ended: Ended) -> None:
        """Count a worker that ended before its time."""
        executor = self._executor
        self._fruitless += 1
        if self._fruitless >= executor.attempts * executor.workers and not lost:
            raise StageError(
                Failure.WORKER_LOST,
                f"expected workers of executor {executor.kind} to start, and {self._fruitless} "
                f"ended one after the other without a result, the last with {ended.how}; mend "
                "that, then run the same command again: what was done is kept",
            )
        for item_id in lost:
            self._losses[item_id] += 1
            if self._losses[item_id] >= executor.attempts:
                raise StageError(
                    Failure.WORKER_LOST,
                    f"expected a worker to finish {self._items[item_id].label}, and "
                    f"{self._losses[item_id]} were lost in it, the last with {ended.how}; look at "
                    "the memory of the machines, raise executor.attempts, then run the same "
                    "command again: what was done is kept",
                )
