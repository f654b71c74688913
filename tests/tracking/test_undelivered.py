"""Runs that MLflow does not take: the stage's work stands, and they are delivered later, once."""

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantline.cli import app
from quantline.config.tracking import Tracking
from quantline.errors import Failure, StageError
from quantline.run.stage import stage_run
from quantline.tracking import store
from quantline.tracking.store import TrackingError, with_client
from quantline.tracking.undelivered import Run, deliver, keep, kept, log_or_keep
from tests.helpers.project import Project

DOWN = ["tracking=server", "tracking.uri=http://127.0.0.1:9"]
SECRET = "Tr0ub4dor"
UNDELIVERED = Path(".quantline/undelivered")


def runs(root: Path) -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("quantline")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def local(root: Path) -> Tracking:
    return Tracking(uri=f"sqlite:///{root}/mlflow.db", experiment="quantline")


@pytest.fixture
def down(project, monkeypatch) -> Project:
    """A project whose server does not answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project.compose(*DOWN)
    return project


def test_track_keeps_what_a_server_that_is_down_does_not_take(down, capsys):
    Path("page.html").write_text("first")
    with stage_run("load") as run:
        assert run.track("a", "a", metrics={"x": 1}, files=[Path("page.html")]) is None
        assert run.track("b", "b", metrics={"x": 2}) is None
    (warning,) = [line for line in down.events() if line["severity"] == "warning"]
    assert warning["reason_code"] == "run_not_tracked"
    assert warning["payload"]["failure"] == Failure.NETWORK_UNAVAILABLE
    assert "Connection refused" in warning["summary"]  # MLflow's own reason
    assert "`quantline track` delivers it" in warning["summary"]
    assert down.events()[-1]["reason_code"] == "stage_finished"
    assert "does not have what load made" in capsys.readouterr().err
    assert [run.key for _, run in kept()] == ["a", "b"]

    Path("page.html").write_text("a later one")
    down.compose()  # the local store
    with stage_run("load") as run:
        assert run.track("c", "c", metrics={"x": 3})
    logged = {run.data.tags["quantline.key"]: run for run in runs(down.root)}
    assert {key: run.data.metrics["x"] for key, run in logged.items()} == {"a": 1, "b": 2, "c": 3}
    assert {run.info.status for run in logged.values()} == {"FINISHED"}
    assert logged["a"].info.start_time < logged["c"].info.start_time
    (page,) = (down.root / "mlartifacts").rglob("page.html")
    assert page.read_text() == "first"  # as it was when the stage ended
    assert list(kept()) == []


def test_deliver_twice_is_there_once(down):
    run = Run("a", "a", params={"p": 1}, metrics={"x": 1.5}, tags={"t": "v"}, started=time.time())
    for _ in range(2):
        keep(run)
    assert len(list(UNDELIVERED.iterdir())) == 1
    shutil.copytree(UNDELIVERED, "again")
    assert [one.key for one in deliver(local(down.root)).delivered] == ["a"]
    shutil.copytree("again", UNDELIVERED, dirs_exist_ok=True)  # killed before it was taken away
    deliver(local(down.root))
    (logged,) = runs(down.root)
    assert logged.data.metrics == {"x": 1.5}
    with sqlite3.connect(down.root / "mlflow.db") as database:
        assert database.execute("select count(*) from metrics").fetchone() == (1,)


def test_keep_keeps_no_secrets_and_kept_skips_what_is_none_of_ours(down, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    keep(Run("a", "a", params={"uri": f"https://a:{SECRET}x@b.org"}, tags={"m": f"{SECRET}"}))
    texts = [path.read_text() for path in UNDELIVERED.rglob("*") if path.is_file()]
    assert texts and SECRET not in "".join(texts)
    for name, text in (("1-torn", '{"key": "x'), ("2-foreign", "[1]"), ("3-empty", "")):
        (UNDELIVERED / name).mkdir()
        (UNDELIVERED / name / "run.json").write_text(text)
    assert [run.key for _, run in kept()] == ["a"]


def test_track_does_not_fail_a_stage_whose_run_cannot_even_be_kept(down, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantline.tracking.undelivered.keep", full)
    with stage_run("load") as run:
        assert run.track("a", "a") is None
    warning = down.events()[-2]
    assert warning["severity"] == "warning" and "cannot be kept" in warning["summary"]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_log_or_keep_waits_seconds_for_a_server_that_hangs(down, silent_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracking = Tracking(uri=silent_server, experiment="x")
    started = time.monotonic()
    for key in ("a", "b", "c"):  # it is asked once
        outcome = log_or_keep(tracking, Run(key, key))
        assert outcome.error.failure is Failure.NETWORK_UNAVAILABLE
    assert time.monotonic() - started < 8
    assert "imed out" in str(outcome.error)


def test_with_client_bounds_requests_and_a_server_that_drips(down, monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    release = threading.Event()
    tracking = Tracking(uri="http://127.0.0.1:9", experiment="x")
    with pytest.raises(TrackingError, match=r"did not answer within 0\.1 s") as error:
        with_client(tracking, lambda _: release.wait(30), 0.1)
    release.set()
    assert error.value.failure is Failure.NETWORK_UNAVAILABLE
    from mlflow.environment_variables import (
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
    )

    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() <= 5
    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() <= 1


def test_a_failed_stage_is_a_failed_run_without_secrets(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for _ in range(2):
        with pytest.raises(SystemExit), stage_run("export", "bf16"):
            raise StageError(Failure.NON_FINITE, f"found NaN at https://a:b@c.org/?token={SECRET}")
    (failed,) = runs(project.root)
    assert failed.info.status == "FAILED"
    tags = failed.data.tags
    assert (tags["failure"], tags["instance"]) == ("non_finite", "bf16")
    assert (tags["stage"], tags["reason_code"]) == ("export", "export_run_failed")
    assert tags["message"] == "found NaN at https://c.org/?token=***"
    assert SECRET.encode() not in (project.root / "mlflow.db").read_bytes()


def test_a_failed_stage_makes_no_database_and_its_run_comes_later(project, empty_database):
    (project.root / "mlflow.db").unlink()
    with pytest.raises(SystemExit), stage_run("export", "bf16"):
        raise StageError(Failure.NON_FINITE, "found NaN")
    assert not (project.root / "mlflow.db").exists()
    shutil.copy(empty_database, project.root / "mlflow.db")
    with stage_run("load") as run:
        run.track("a", "a")
    assert {run.info.status for run in runs(project.root)} == {"FAILED", "FINISHED"}


def test_two_first_stages_make_one_store(project, empty_database, monkeypatch):
    path = project.root / "mlflow.db"
    path.unlink()
    made = []

    def make_tables(temporary: Path) -> None:
        made.append(temporary)
        assert not path.exists()
        time.sleep(0.2)
        shutil.copy(empty_database, temporary)

    monkeypatch.setattr(store, "make_tables", make_tables)
    outcomes = []
    threads = [
        threading.Thread(
            target=lambda: outcomes.append(log_or_keep(local(path.parent), Run("a", "a")))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert len(runs(project.root)) == 1
    assert list(project.root.glob(".mlflow.db*")) == []


@pytest.mark.slow
def test_two_first_processes_make_one_store(project):
    path = project.root / "mlflow.db"
    path.unlink()
    code = (
        "import sys\n"
        "from quantline.config.tracking import Tracking\n"
        "from quantline.tracking.undelivered import Run, log_or_keep\n"
        f"tracking = Tracking(uri='sqlite:///{path}', experiment='quantline')\n"
        "outcome = log_or_keep(tracking, Run(sys.argv[1], 'a'))\n"
        "assert outcome.run_id and not outcome.error, outcome\n"
    )
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen([*command, key], cwd=project.root) for key in ("a", "b", "a")]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert sorted(run.data.tags["quantline.key"] for run in runs(project.root)) == ["a", "b"]


def test_a_killed_first_stage_leaves_no_half_store(project, empty_database, monkeypatch):
    path = project.root / "mlflow.db"
    path.unlink()

    def stop(temporary: Path) -> None:
        temporary.write_bytes(b"SQLite format 3")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "make_tables", stop)
    with pytest.raises(KeyboardInterrupt):
        log_or_keep(local(project.root), Run("a", "a"))
    (project.root / ".mlflow.db.0123abcd").write_bytes(b"of one that was killed")
    monkeypatch.setattr(store, "make_tables", lambda path: shutil.copy(empty_database, path))
    assert log_or_keep(local(project.root), Run("a", "a")).run_id
    assert list(project.root.glob(".mlflow.db*")) == []


def no_database(path: Path) -> None:
    path.write_bytes(b"no database at all, but text" * 100)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_version(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("update alembic_version set version_num = 'of tomorrow'")


def full(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create trigger full before insert on runs begin "
                         "select raise(fail, 'database or disk is full'); end")  # fmt: skip


def locked(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create trigger busy before insert on runs begin "
                         "select raise(fail, 'database is locked'); end")  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "failure", "words"),
    [
        (no_database, Failure.TRACKING_REFUSED, "file is not a database; move the file away"),
        (a_folder, Failure.TRACKING_REFUSED, "unable to open database file"),
        (of_another_version, Failure.TRACKING_REFUSED, "of tomorrow"),
        (full, Failure.DISK_FULL, "disk is full; free some space"),
        (locked, Failure.PROJECT_BUSY, "is locked; close the program that holds the file"),
    ],
)
def test_log_or_keep_names_what_is_wrong_with_a_store(project, harm, failure, words):
    harm(project.root / "mlflow.db")
    started = time.monotonic()
    outcome = log_or_keep(local(project.root), Run("a", "a"))
    assert outcome.run_id is None
    assert outcome.error.failure is failure
    assert words in str(outcome.error)
    assert len(str(outcome.error)) < 900
    assert time.monotonic() - started < 20
    assert len(list(kept())) == 1


@pytest.mark.parametrize(
    ("uri", "failure", "words"),
    [
        ("sqlite:////nowhere/at/all/mlflow.db", Failure.MISSING_FILE, "No such file"),
        ("postgresql+nodriver://127.0.0.1:9/x", Failure.TRACKING_REFUSED, "nodriver"),
        ("mysql://127.0.0.1:9/x", Failure.TRACKING_REFUSED, "MySQLdb"),
        ("https://[half/", Failure.TRACKING_REFUSED, ""),
    ],
)
def test_log_or_keep_names_what_is_wrong_with_an_address(project, uri, failure, words):
    started = time.monotonic()
    outcome = log_or_keep(Tracking(uri=uri, experiment="x"), Run("a", "a"))
    assert (outcome.run_id, outcome.error.failure) == (None, failure)
    assert words in str(outcome.error)
    assert time.monotonic() - started < 30


def test_quantline_track_delivers_all_and_registers(down, monkeypatch):
    ran = []
    monkeypatch.setattr("quantline.cli.track.run_module", lambda name: ran.append(name) or 0)
    answer = CliRunner().invoke(app, ["track"])
    assert (answer.exit_code, answer.output) == (0, "no run waits for MLflow\n")
    with stage_run("load") as run:
        run.track("a", "a")
    answer = CliRunner().invoke(app, ["track"])
    assert answer.exit_code == 1 and "network_unavailable" in answer.output
    keep(Run("b", "compare", tags={"stage": "compare"}))
    down.compose()
    answer = CliRunner().invoke(app, ["track"])
    assert (answer.exit_code, answer.output) == (0, "2 of 2 runs delivered\n")
    assert ran == ["stages.compare"]
    assert len(runs(down.root)) == 2


def test_promote_waits_for_mlflow(down):
    from tests.helpers.report import write_measured

    down.compose(*DOWN, "suite=default", "variant=[gguf-q8_0]", "recipe=[q8_0]")
    write_measured("gguf-q8_0", 5, 0.001)
    down.stage("compare")
    line = [line for line in down.events() if line["reason_code"] == "model_not_registered"][-1]
    assert "`quantline track` delivers them and registers the pick" in line["summary"]
    assert json.loads(Path("reports/compression.json").read_text())["pick"] == "gguf-q8_0"
    assert {run.tags["stage"] for _, run in kept()} == {"compare", "evaluate"}
