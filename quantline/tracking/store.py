"""The MLflow store: opened by one process at a time, bounded in time, its errors named.

What goes wrong here never undoes what a stage has made: `TrackingError` says that the store takes
no run now, and quantline.tracking.undelivered keeps it for later.
"""

import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from quantline.causes import failure_of
from quantline.config.compose import project_root
from quantline.config.tracking import Tracking
from quantline.durable import remove_leftovers, sync, temporary_path
from quantline.errors import ConfigError, Failure, StageError
from quantline.messages import plain, shortened, without_secrets
from quantline.tracking.moved_project import follow_project, note_guest

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SQLITE = "sqlite:///"
FOLDER = ".quantline"
LOCK = "mlflow.lock"
SQLITE_HEADER = b"SQLite format 3\0"
LOCK_WAIT_S = 60.0  # making the tables takes seconds, on a busy machine many
TABLES_S = 120.0  # the same in a database server
AGAIN_S = 0.5  # between two looks at tables that somebody else makes
REQUEST_S = 5  # for one answer of a server
RETRIES = 1
RUN_S = 20.0  # for all requests of a run
LONGEST_REASON = 600  # characters of MLflow's own words
Result = TypeVar("Result")
# A file, a connection; a database without a driver; an address that is none.
OTHERS = (OSError, ImportError, ValueError)

# What to do, by what sqlite says.
SQLITE_ADVICE = {
    "locked": "close the program that holds the file",
    "readonly": "make the file and its folder writable, or name another tracking.uri",
    "unable to open": "make the file and its folder writable, or name another tracking.uri",
    "full": "free some space",
    "not a database": "move the file away, and a new one is made",
    "malformed": "move the file away, and a new one is made",
    "schema": "run `mlflow db upgrade` on tracking.uri",
}
UNREACHABLE = re.compile(
    "failed with exception|connection refused|could not connect|error code 50[0234]"
)
# What databases and MLflow say of tables that somebody else is making.
HALF_MADE = re.compile(
    "already exists|duplicate|does not exist|doesn't exist|out-of-date|can't locate revision"
)
_opened: set[str] = set()  # addresses whose tables this process has seen
_failed: dict[str, StageError] = {}  # address → why this process does not ask there again


class TrackingError(StageError):
    """MLflow does not take something now; what was made stands."""


def main_root() -> Path:
    """Return the main repository's root, also in the copies where DVC runs queued experiments.

    Raises:
        ConfigError: Outside a project.
    """
    root = project_root()
    for folder in root.parents:
        if folder.name == ".dvc" and root.is_relative_to(folder / "tmp"):
            return folder.parent
    return root


def events_root() -> Path:
    """Return the main repository's root; the working folder where there is none."""
    try:
        return main_root()
    except ConfigError:
        return Path.cwd()


def tracking_uri(uri: str) -> str:
    """Return the URI with a relative sqlite path resolved against the main repository."""
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + str(main_root() / uri.removeprefix(SQLITE))
    return uri


def database_file(uri: str) -> Path | None:
    """Return the file of a store in sqlite; None for a server, another database, or options."""
    path = tracking_uri(uri).removeprefix(SQLITE)
    if not uri.startswith(SQLITE) or "?" in path or ":memory:" in path:
        return None
    return Path(path)


def with_client(
    tracking: Tracking, use: "Callable[[MlflowClient], Result]", seconds: float | None = RUN_S
) -> Result:
    """Call `use` with a client of the tracking store and return its result.

    Args:
        tracking: The section of params.yaml.
        use: What to do.
        seconds: How long a server may take for all of it; None for uploads, whose requests alone
            are bounded. After a server failed, it is not asked again in this process.

    Raises:
        TrackingError: network_unavailable, if a server does not answer; tracking_refused, if MLflow
            gives another reason; and what `failure_of` names: disk_full, permission_denied, ….
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(RETRIES))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_S))
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)  # its errors are raised as well
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    uri = tracking_uri(tracking.uri)
    if uri in _failed:
        raise _failed[uri]

    def call() -> Result:
        return use(MlflowClient(tracking_uri=uri, registry_uri=uri))

    try:
        with _one_at_a_time(uri):
            _make_database(uri)
            if seconds is None or database_file(uri):
                return call()
            return _within(call, seconds, uri)
    except (MlflowException, SQLAlchemyError, sqlite3.Error, *OTHERS) as error:
        named = _named(error, uri)
        if named.failure is Failure.NETWORK_UNAVAILABLE:
            _failed[uri] = named
        raise named from None


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Hold a store.

    MLflow makes its tables without asking who else does, and two that look for a run of one key
    would both make it.
    """
    path = _lock_file(uri)
    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise TrackingError(
            Failure.PROJECT_BUSY,
            f"expected the MLflow store to be free within {LOCK_WAIT_S:g} s, found that another "
            "process uses it",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _lock_file(uri: str) -> Path:
    """Return the file that is locked: of a database elsewhere, one beside it.

    Another project may use that database too.
    """
    database = database_file(uri)
    if database is None or not _may_be_database(database):
        return main_root() / FOLDER / LOCK
    if _is_project(database.parent):  # that project locks it by the same name
        return database.parent / FOLDER / LOCK
    return database.parent / f".{database.name}.lock"


def _is_project(folder: Path) -> bool:
    is_other = (folder / "dvc.yaml").is_file() and (folder / "conf").is_dir()
    return is_other or folder == main_root()


def _may_be_database(path: Path) -> bool:
    """Whether a file is a database, or can become one; nothing is written beside another file."""
    if not path.is_file():
        return path.parent.is_dir() and not path.exists()
    with path.open("rb") as file:
        return file.read(len(SQLITE_HEADER)) in (b"", SQLITE_HEADER)


def _make_database(uri: str) -> None:
    """Make the tables of a database that is not there yet; it appears whole or not at all.

    One that is there is looked at without MLflow, which tries for minutes to open what it cannot.
    """
    path = database_file(uri)
    if path is None:
        if not uri.startswith("http"):
            _within(partial(_open_with_others, uri), TABLES_S, uri)
        return
    if path.parent != main_root() and _is_project(path.parent):
        note_guest(path.parent, main_root())
    if path.exists() and (path.is_dir() or path.stat().st_size):
        with closing(sqlite3.connect(path)) as database:
            database.execute("begin immediate")
            if path.parent == main_root():
                follow_project(database, path.parent)
            database.commit()
        return
    remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        temporary.touch()
        make_tables(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _open_with_others(uri: str) -> None:
    """Open a database server's store, which makes its tables, while others may do so too.

    MLflow looks whether there are tables and then makes them. Of two machines that do so at once,
    one fails, and finds the tables that the other makes a little later.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import IntegrityError, InternalError, ProgrammingError

    if uri in _opened:
        return
    deadline = time.monotonic() + TABLES_S / 2
    while True:
        try:
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        except (MlflowException, IntegrityError, InternalError, ProgrammingError) as error:
            if time.monotonic() > deadline or not HALF_MADE.search(str(error).lower()):
                raise
            time.sleep(AGAIN_S)
        else:
            _opened.add(uri)
            return


def make_tables(path: Path) -> None:
    """Make an MLflow database without runs."""
    from mlflow.tracking import MlflowClient

    MlflowClient(tracking_uri=f"{SQLITE}{path}").search_experiments(max_results=1)


def _within(call: Callable[[], Result], seconds: float, uri: str) -> Result:
    """Call a function in a thread that is left behind after so many seconds."""
    answers: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{without_secrets(uri)} did not answer within {seconds:g} s")
    if errors:
        raise errors[0]
    result: Result = answers[0]
    return result


def _named(error: Exception, uri: str) -> TrackingError:
    """Return what went wrong with a store, in MLflow's own words and with what to do."""
    reason = _reason(error)
    words = str(error).lower()
    if uri.startswith("sqlite"):
        failure = failure_of(error)
        if failure is Failure.INTERNAL_ERROR:
            failure = Failure.TRACKING_REFUSED
        advice = [text for word, text in SQLITE_ADVICE.items() if word in words]
        return TrackingError(
            failure,
            "expected an MLflow database at tracking.uri, but it does not take the run: "
            f"{reason}{''.join(f'; {text}' for text in advice[:1])}",
        )
    # MLflow wraps an answer that refuses in an error with a code of its own.
    if isinstance(error, OSError) or UNREACHABLE.search(words):
        return TrackingError(
            Failure.NETWORK_UNAVAILABLE,
            "expected an MLflow server at tracking.uri, but it does not take the run: "
            f"{reason}; start it, or compose with tracking=local",
        )
    return TrackingError(
        Failure.TRACKING_REFUSED,
        f"the MLflow server at tracking.uri does not take the run: {reason}",
    )


def _reason(error: Exception) -> str:
    """Return the line of an error that says the most."""
    lines = plain(error).strip().splitlines() or [type(error).__name__]
    # SQLAlchemy's advice comes before the words of the database.
    of_database = [line for line in lines if re.match(r"\(\w+\.\w+\) ", line)]
    return shortened((of_database or lines)[0], LONGEST_REASON)
