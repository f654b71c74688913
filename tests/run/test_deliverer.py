"""Stages keep their runs, and another process logs them."""

import os
import signal
from types import SimpleNamespace

import psutil
import pytest

from quantline.run.deliverer import DELIVERER, deliver_until, delivering, has_deliverer
from quantline.run.stage import stage_run
from quantline.tracking.undelivered import Run, deliver, keep, waiting
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


def test_a_deliverer_that_is_killed_leaves_it_to_the_stage_and_is_told(project, capfd):
    with delivering():
        pid = int(os.environ[DELIVERER])
        os.kill(pid, signal.SIGKILL)
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # nobody has asked for its end
            pass
        with stage_run("load") as run:
            assert run.track("a", "a") is not None
    assert "ended by signal 9" in capfd.readouterr().err


def test_a_deliverer_of_an_earlier_boot_is_none(project, monkeypatch):
    monkeypatch.setenv(DELIVERER, "99999999")
    assert not has_deliverer()


def test_ctrl_c_lets_the_deliverer_log_what_failed_by_it(project, capfd):
    with pytest.raises(KeyboardInterrupt), delivering():
        os.kill(int(os.environ[DELIVERER]), signal.SIGINT)
        with pytest.raises(SystemExit), stage_run("load"):
            raise KeyboardInterrupt
        raise KeyboardInterrupt
    (failed,) = runs(project.root)
    assert failed.info.status == "FAILED" and waiting() == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_kept_run_has_the_commit_at_which_it_was_made(project, monkeypatch):
    made_by = {"mlflow.user": "ada", "git_commit": "c0ffee"}
    monkeypatch.setattr("quantline.tracking.undelivered.origin_tags", lambda stage: made_by)
    keep(Run("a", "a"))
    deliver(local(project.root))
    (run,) = runs(project.root)
    assert made_by.items() <= run.data.tags.items()


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


class Store:
    """Takes some runs and refuses others, while more are kept."""

    def __init__(self, monkeypatch, more: list[str], refuses: str = "") -> None:
        self.kept = ["first"]
        self.tried: list[str] = []
        self.more = more
        self.refuses = refuses
        monkeypatch.setattr("quantline.run.deliverer.waiting", lambda: list(self.kept))
        monkeypatch.setattr("quantline.run.deliverer.deliver", self.deliver)

    def deliver(self, tracking) -> SimpleNamespace:
        tried = list(self.kept)
        self.tried += tried
        self.kept = [name for name in tried if name == self.refuses] + self.more[:1]
        del self.more[:1]
        return SimpleNamespace(error="refused" if self.refuses in tried else None)


def test_deliver_until_delivers_what_is_kept_meanwhile(monkeypatch, tmp_path):
    store = Store(monkeypatch, ["second", "third"])
    with open(os.devnull) as ended:
        deliver_until(ended.fileno(), local(tmp_path))
    assert store.tried == ["first", "second", "third"] and store.kept == []


def test_deliver_until_tries_again_only_beside_something_new(monkeypatch, tmp_path, capsys):
    store = Store(monkeypatch, ["second"], refuses="first")
    with open(os.devnull) as ended:
        deliver_until(ended.fileno(), local(tmp_path))
    assert store.tried == ["first", "first", "second"] and store.kept == ["first"]
    assert "does not have all" in capsys.readouterr().err
