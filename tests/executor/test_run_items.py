"""Having workers do items: the order, those that are lost, failures, and what a killed run left."""

import os
from pathlib import Path

import pytest

from quantline.config.executor import Executor
from quantline.errors import Failure, StageError
from quantline.executor.item import Item
from quantline.executor.run_items import FOLDER, run_items
from quantline.files import read_json

TWO = Executor(workers=2, attempts=3)


def items_of(numbers) -> list[Item]:
    return [Item(f"number {number}", "square", {"number": number}) for number in numbers]


def run(items: list[Item], folder: Path, executor: Executor = TWO) -> dict[int, int]:
    """Run items; return number → square."""
    taken = {}

    def take(item: Item, made: Path) -> None:
        taken[item.arguments["number"]] = read_json(made / "square.json")["square"]
        os.rename(made, folder / str(item.arguments["number"]))

    run_items(executor, items, folder, take, "squares", "number")
    return taken


def failure_of(numbers, folder: Path, executor: Executor = TWO) -> StageError:
    with pytest.raises(StageError) as caught:
        run(items_of(numbers), folder, executor)
    return caught.value


def test_run_items_does_every_item_once_and_leaves_nothing(tmp_path, workers_here):
    used = workers_here()
    assert run(items_of(range(5)), tmp_path) == {number: number**2 for number in range(5)}
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3", "4"]
    assert len(used[0].started) <= TWO.workers


def test_run_items_starts_no_more_workers_than_there_are_items(tmp_path, workers_here):
    used = workers_here(lambda number: number == 1)
    run(items_of([3]), tmp_path, Executor(workers=7))
    assert len(used[0].started) == 2  # the second in place of the first, which was lost


def test_run_items_does_nothing_without_items(tmp_path, workers_here):
    used = workers_here()
    run([], tmp_path)
    assert used == [] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_run_items_does_again_what_was_lost(tmp_path, workers_here, workers):
    workers_here(lambda number: number % 3 != 0)
    executor = Executor(workers=workers, attempts=9)
    assert run(items_of(range(9)), tmp_path, executor) == {n: n**2 for n in range(9)}


def test_run_items_names_an_item_whose_workers_are_lost_again_and_again(tmp_path, workers_here):
    workers_here(lambda number: True)
    error = failure_of([4, 5], tmp_path, Executor(workers=1, attempts=3))
    assert error.failure is Failure.WORKER_LOST
    assert "finish number 4, and 3 were lost in it, the last with signal 9" in str(error)
    assert "executor.attempts" in str(error)


def test_run_items_says_why_workers_do_not_start(tmp_path, workers_here):
    used = workers_here(lambda number: None)
    error = failure_of([4, 5], tmp_path)
    assert error.failure is Failure.WORKER_LOST
    assert "to start, and 6 ended" in str(error) and "no such module" in str(error)
    assert len(used[0].started) <= 7


def test_run_items_raises_the_failure_of_an_item_by_its_name(tmp_path, workers_here):
    workers_here()
    error = failure_of([2, 13, 3], tmp_path)
    assert error.failure is Failure.INTERNAL_ERROR
    assert str(error).startswith("ValueError: 13 brings bad luck")


def test_run_items_waits_for_the_items_before_one_that_failed(tmp_path, workers_here):
    # The first worker is lost in item 2; the second fails in 13; a third does 2 after all.
    workers_here(lambda number: number == 1)
    failure_of([2, 13, 3], tmp_path)
    assert (tmp_path / "2/square.json").is_file() and not (tmp_path / "3").exists()


def test_run_items_takes_what_a_killed_run_left(tmp_path, workers_here):
    used = workers_here()

    def stop(item: Item, made: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_items(Executor(workers=1), items_of(range(3)), tmp_path, stop, "squares", "number")
    assert len(os.listdir(tmp_path / FOLDER / "results")) == 3
    assert run(items_of(range(3)), tmp_path) == {0: 0, 1: 1, 2: 4}
    assert used[1].started == []  # nobody had to work again
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]


def test_run_items_refuses_a_function_that_is_not_in_the_list(tmp_path, workers_here):
    workers_here()
    with pytest.raises(
        StageError, match=r"expected a function of quantize_part, .*found rm"
    ) as caught:
        run_items(TWO, [Item("x", "rm", {})], tmp_path, lambda item, made: None, "x", "item")
    assert caught.value.failure is Failure.CONFIG_INVALID
