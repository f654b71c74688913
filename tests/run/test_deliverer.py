"""Stages keep their runs, and another process logs them."""

import os
import subprocess
import sys

import pytest

from quantline.run.deliverer import DELIVERER, deliver_until, delivering
from quantline.run.stage import stage_run
from quantline.tracking.undelivered import Run, keep, waiting
from tests.helpers.tracking import local, runs

SERVERLESS = "tracking.uri=http://127.0.0.1:9"


def keys(project) -> set[str]:
    return {run.data.tags["quantline.key"] for run in runs(project.root)}


def test_runs_that_stages_keep_are_logged_at_the_end_of_the_block(project):
    with delivering():
        with stage_run("load") as run:
            assert run.track("a", "a", metrics={"x": 1}) is None
        with stage_run("compare") as run:
            # Before its own run are those of the stages that it compares.
            assert run.track("b", "b", at_once=True) is not None
            assert keys(project) == {"a", "b"}
        with stage_run("load") as run:
            run.track("c", "c")
    assert waiting() == []
    assert keys(project) == {"a", "b", "c"}


def test_a_failed_stage_is_logged_too(project):
    with delivering(), pytest.raises(SystemExit), stage_run("load"):
        raise OSError(28, "No space left on device")
    (failed,) = runs(project.root)
    assert failed.info.status == "FAILED"


def test_a_deliverer_that_is_gone_leaves_it_to_the_stage(project, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv(DELIVERER, str(gone.pid))
    with stage_run("load") as run:
        assert run.track("a", "a") is not None


def test_what_a_store_does_not_take_waits_and_is_said(project, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project.compose(SERVERLESS)
    with delivering(), stage_run("load") as run:
        run.track("a", "a")
    assert len(waiting()) == 1
    assert "`quantline track` delivers it" in capfd.readouterr().err


def test_a_block_that_ends_by_an_error_waits_for_nothing(project):
    with pytest.raises(KeyError), delivering():
        pid = int(os.environ[DELIVERER])
        raise KeyError
    assert DELIVERER not in os.environ
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_deliver_until_tries_what_is_refused_once(project, monkeypatch):
    keep(Run("a", "a"))
    calls = []
    reading, writing = os.pipe()

    def refuse(tracking):
        calls.append(tracking)
        if len(calls) == 1:
            return type("Delivery", (), {"error": None})
        raise AssertionError("tried again")

    def wait_once(*_):
        waits.append(_)
        return ([reading] if len(waits) > 2 else [], [], [])

    waits: list[object] = []
    monkeypatch.setattr("quantline.run.deliverer.deliver", refuse)
    monkeypatch.setattr("quantline.run.deliverer.select.select", wait_once)
    deliver_until(reading, local(project.root))
    assert len(calls) == 1 and len(waits) == 3
    os.close(reading)
    os.close(writing)
