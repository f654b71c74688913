"""The store of runs is made once, and what is wrong with one is named."""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quantline.config.tracking import Tracking
from quantline.errors import Failure
from quantline.tracking import store
from quantline.tracking.store import TrackingError, with_client
from quantline.tracking.undelivered import Run, kept, log_or_keep
from tests.helpers.tracking import local, runs


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


def test_a_database_in_another_project_is_locked_as_that_project_locks_it(project, tmp_path):
    other = tmp_path / "other"
    (other / "conf").mkdir(parents=True)
    (other / "dvc.yaml").touch()
    assert store._lock_file(f"sqlite:///{other}/mlflow.db") == other / ".quantline/mlflow.lock"


def test_runs_of_another_project_keep_their_files_when_the_owner_logs(
    project, tmp_path, empty_database, monkeypatch
):
    owner = tmp_path / "owner"
    (owner / "conf").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(project.root / name, owner / name)
    shutil.copy(empty_database, owner / "mlflow.db")
    uri = f"sqlite:///{owner}/mlflow.db"
    assert log_or_keep(Tracking(uri=uri, experiment="x"), Run("a", "a")).error is None
    before = artifact_uris(owner / "mlflow.db")
    assert before == {f"{project.root.as_uri()}/mlartifacts"}
    monkeypatch.chdir(owner)
    assert log_or_keep(Tracking(uri="sqlite:///mlflow.db", experiment="y"), Run("b", "b")).run_id
    assert before < artifact_uris(owner / "mlflow.db")
    assert f"{owner.as_uri()}/mlartifacts" in artifact_uris(owner / "mlflow.db")


def artifact_uris(path) -> set[str]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("select artifact_location from experiments").fetchall()
    return {place for (place,) in rows if place.endswith("/mlartifacts")}


def test_a_database_outside_the_project_is_locked_beside_itself(project, tmp_path, empty_database):
    """Another project may use it at the same time."""
    shared = tmp_path / "shared"
    shared.mkdir()
    uri = f"sqlite:///{shared}/mlflow.db"
    assert store._lock_file(uri) == shared / ".mlflow.db.lock"
    assert store._lock_file("sqlite:///mlflow.db").parent == project.root / ".quantline"
    assert store._lock_file("https://here").parent == project.root / ".quantline"
    assert store._lock_file("sqlite:////nowhere/mlflow.db").parent == project.root / ".quantline"
    shutil.copy(empty_database, shared / "mlflow.db")
    assert log_or_keep(Tracking(uri=uri, experiment="x"), Run("a", "a")).error is None


def test_tables_that_another_machine_is_making_are_waited_for(project, monkeypatch):
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import ProgrammingError

    errors = [
        ProgrammingError("create table", {}, Exception('relation "experiments" already exists')),
        MlflowException("Detected out-of-date database schema"),
    ]

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            if errors:
                raise errors.pop()

        def search_experiments(self, max_results: int) -> None: ...

    monkeypatch.setattr("mlflow.tracking.MlflowClient", Client)
    monkeypatch.setattr(store, "AGAIN_S", 0.01)
    monkeypatch.setattr(store, "_opened", set())
    uri = "postgresql+nodriver://127.0.0.1:9/x"
    store._open_with_others(uri)
    assert errors == [] and uri in store._opened

    errors.append(MlflowException("password authentication failed"))
    with pytest.raises(MlflowException, match="password"):
        store._open_with_others(uri + "y")


POSTGRES = shutil.which("initdb") and shutil.which("postgres")


@pytest.mark.slow
@pytest.mark.skipif(not POSTGRES, reason="PostgreSQL is not installed")
def test_processes_that_open_one_database_server_at_once_all_log_their_runs(project, tmp_path):
    pytest.importorskip("psycopg2")
    from tests.helpers.postgres import postgres

    code = (
        "import sys\n"
        "from quantline.config.tracking import Tracking\n"
        "from quantline.tracking.undelivered import Run, log_or_keep\n"
        "outcome = log_or_keep(Tracking(uri=sys.argv[1], experiment='x'), Run(sys.argv[2], 'a'))\n"
        "assert outcome.run_id and not outcome.error, outcome\n"
    )
    with postgres(tmp_path / "postgres") as uri:
        started = []
        for key in ("a", "b"):  # in projects of their own, so that no lock of ours parts them
            root = tmp_path / key
            shutil.copytree(project.root, root)
            command = [sys.executable, "-c", code, uri, key]
            started.append(subprocess.Popen(command, cwd=root))
        assert [process.wait() for process in started] == [0, 0]
