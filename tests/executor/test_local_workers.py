"""Workers that are processes of this machine."""

import os
import time
from pathlib import Path

import psutil
import pytest

from quantline.config.executor import Executor
from quantline.executor.item import Item
from quantline.executor.local_workers import LocalWorkers, local_workers
from quantline.executor.queue import Queue
from quantline.executor.workers import settings_of


@pytest.fixture
def queue(tmp_path) -> Queue:
    """A queue whose item no worker can do."""
    queue = Queue.begin(tmp_path / "items", [Item("x", "unknown", {})])
    queue.add_worker("a")
    queue.add_worker("b")
    return queue


def wait_for_end(worker):
    for _ in range(600):
        ended = worker.ended()
        if ended is not None:
            return ended
        time.sleep(0.1)
    raise AssertionError("it does not end")


def test_local_workers_run_in_a_process_that_ends_well(queue):
    with local_workers(Executor(workers=2), queue) as workers:
        assert wait_for_end(workers.start("a", 0)) == (True, "exit code 0")
    assert queue.failure(queue.order[0])["failure"] == "config_invalid"


def test_local_workers_say_how_a_worker_ended(queue, monkeypatch):
    monkeypatch.setattr("quantline.executor.local_workers.sys.executable", "/bin/false")
    with local_workers(Executor(workers=2), queue) as workers:
        assert wait_for_end(workers.start("a", 0)) == (False, "exit code 1")
        monkeypatch.setattr("quantline.executor.local_workers.sys.executable", "/bin/sh")
        ended = wait_for_end(workers.start("b", 1))
    assert not ended.well and ended.how.startswith("exit code 2: ") and "-X" in ended.how


def test_local_workers_end_with_the_block(queue, monkeypatch):
    lasting = queue.folder / "lasting"
    lasting.write_text("#!/bin/sh\nexec sleep 60\n")
    lasting.chmod(0o755)
    monkeypatch.setattr("quantline.executor.local_workers.sys.executable", str(lasting))
    with local_workers(Executor(workers=2), queue) as workers:
        process = workers.start("a", 0).process
        assert workers.start("b", 1).ended() is None
    assert process.returncode == -9 and not psutil.pid_exists(process.pid)


@pytest.mark.parametrize(
    ("seen", "gpus", "expected"),
    [
        (None, 1, ["0", "1", "2"]),
        (None, 2, ["0,1", "2,3", "4,5"]),
        ("4,5,6", 1, ["4", "5", "6"]),
        ("4,5", 1, ["4", "5", ""]),  # the third finds none, and says so
    ],
)
def test_local_workers_share_the_gpus(queue, monkeypatch, seen, gpus, expected):
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    workers = LocalWorkers(Executor(workers=3, gpus=gpus), queue)
    assert [workers.gpus_of(place) for place in range(3)] == expected


def test_settings_of_a_worker_name_this_quantline_and_its_threads(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/else/where")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    settings = settings_of(3, 0)
    root = str(Path(__file__).parents[2])
    assert settings["PYTHONPATH"] == os.pathsep.join([root, "/else/where"])
    assert settings["OMP_NUM_THREADS"] == settings["MKL_NUM_THREADS"] == "3"
    assert settings["CUDA_VISIBLE_DEVICES"] == "" and settings["HF_HUB_OFFLINE"] == "1"
    assert "SECRET_TOKEN" not in settings
    assert "CUDA_VISIBLE_DEVICES" not in settings_of(3, None)
