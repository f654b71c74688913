"""The folder through which workers get items and give back results."""

import os
import shutil

import pytest

from quantline.errors import Failure, StageError
from quantline.executor.item import Item
from quantline.executor.queue import Queue

ITEMS = [Item(f"number {number}", "square", {"number": number}) for number in range(3)]


@pytest.fixture
def queue(tmp_path) -> Queue:
    queue = Queue.begin(tmp_path / "items", ITEMS)
    queue.add_worker("a")
    queue.add_worker("b")
    return queue


def finish(queue: Queue, item: Item, worker: str) -> None:
    made = queue.work_folder(item.id, worker)
    (made / "made.txt").write_text(worker)
    queue.finish(item.id, made)


def test_claim_gives_each_item_to_one_worker_in_order(queue):
    assert [queue.claim("a"), queue.claim("b"), queue.claim("a")] == ITEMS
    assert queue.claim("b") is None
    assert queue.claimed(queue.order) == 3 and queue.unclaimed(queue.order) == []


def test_claim_gives_nothing_after_an_item_that_failed_but_all_before_it(queue):
    assert [queue.claim("a"), queue.claim("b")] == ITEMS[:2]
    queue.fail(ITEMS[1].id, {"failure": "non_finite", "message": "m"})
    assert queue.claim("b") is None and queue.unclaimed(queue.order) == []
    assert queue.release("a", queue.order) == [ITEMS[0].id]
    assert queue.unclaimed(queue.order) == [ITEMS[0].id]
    assert queue.claim("b") == ITEMS[0]


def test_release_takes_back_what_a_worker_did_not_finish(queue):
    queue.claim("a")
    queue.claim("a")
    queue.claim("b")
    finish(queue, ITEMS[0], "a")
    assert queue.release("a", queue.order) == [ITEMS[1].id]
    assert queue.release("a", queue.order) == []
    assert queue.claim("b") == ITEMS[1]


def test_finish_keeps_the_first_of_two_results(queue):
    finish(queue, ITEMS[0], "a")
    finish(queue, ITEMS[0], "b")
    result = queue.result(ITEMS[0].id)
    assert (result / "made.txt").read_text() == "a"
    assert list((queue.folder / "work").iterdir()) == []


def test_finish_says_so_if_a_result_cannot_take_its_name(queue):
    made = queue.work_folder(ITEMS[0].id, "a")
    shutil.rmtree(queue.results)
    with pytest.raises(OSError, match="No such file"):
        queue.finish(ITEMS[0].id, made)


def test_begin_keeps_results_of_the_same_items_and_nothing_else(tmp_path, queue):
    finish(queue, ITEMS[0], "a")
    finish(queue, ITEMS[1], "a")
    queue.claim("b")
    again = Queue.begin(tmp_path / "items", ITEMS[1:])
    assert again.result(ITEMS[0].id) is None
    assert (again.result(ITEMS[1].id) / "made.txt").read_text() == "a"
    again.add_worker("c")
    assert again.claim("c") == ITEMS[2]
    assert sorted(os.listdir(tmp_path / "items")) == sorted([again.folder.name, "results"])


def test_a_worker_of_a_session_that_has_ended_gets_nothing(tmp_path, queue):
    claimed = queue.claim("a")
    made = queue.work_folder(claimed.id, "a")
    queue.remove()
    assert not (tmp_path / "items").exists() and os.listdir(tmp_path) == []
    queue.finish(claimed.id, made)
    queue.fail(claimed.id, {"failure": "non_finite", "message": "m"})
    assert queue.claim("b") is None
    assert os.listdir(tmp_path) == []
    with pytest.raises(StageError) as caught:
        Queue(queue.folder)
    assert caught.value.failure is Failure.MISSING_FILE


def test_claim_belongs_to_one_of_many_workers_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    items = [Item("n", "square", {"number": number}) for number in range(40)]
    queue = Queue.begin(tmp_path / "items", items)
    for number in range(8):
        queue.add_worker(str(number))

    def claim_all(worker: str) -> list[str]:
        claimed = []
        while item := queue.claim(worker):
            claimed.append(item.id)
        return claimed

    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(claim_all, map(str, range(8))))
    together = [item_id for claimed in claims for item_id in claimed]
    assert sorted(together) == sorted(queue.order)
