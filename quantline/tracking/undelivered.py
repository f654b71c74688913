"""Runs that MLflow did not take: kept in a folder, and delivered when it does.

Each is a folder of its own under .quantline/undelivered/ with run.json and copies of the run's
files, so that a later stage cannot change them. A run is found again by its key, and its figures
have the time at which they were made, so one that is delivered twice is there once.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from quantline.causes import failure_of, raise_if_of_machine
from quantline.config.tracking import Tracking
from quantline.errors import Failure
from quantline.files import sha256_json, write_json
from quantline.folders import atomic_folder
from quantline.messages import redacted
from quantline.tracking.logged_models import BundleDescription
from quantline.tracking.mlflow_runs import FINISHED, log_run
from quantline.tracking.run_content import Dataset
from quantline.tracking.run_origin import origin_tags
from quantline.tracking.store import FOLDER, TrackingError, database_file, events_root

UNDELIVERED = "undelivered"
RUN = "run.json"
FILES = "files"
LOCK = "undelivered.lock"


@dataclass
class Run:
    """What a stage logs; the fields are the arguments of `log_run`."""

    key: str
    name: str
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    datasets: Sequence[Dataset] = ()
    started: float | None = None
    logged: float = field(default_factory=time.time)
    status: str = FINISHED
    parent: str | None = None
    model: BundleDescription | None = None
    origin: dict[str, str] | None = None


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
        run_id: MLflow's id of it; None if it was kept.
        delivered: How many that were kept before were delivered with it.
        error: Why it was kept; None if it was delivered.
    """

    run_id: str | None
    delivered: int = 0
    error: TrackingError | None = None


class Delivery(NamedTuple):
    """What became of the runs that were kept.

    Attributes:
        delivered: Those that MLflow has now.
        left: How many it did not take.
        error: The last reason.
    """

    delivered: list[Run]
    left: int
    error: TrackingError | None


def log_or_keep(tracking: Tracking, run: Run) -> Outcome:
    """Log a run, after those that were kept before; keep it if MLflow does not take it.

    Raises:
        OSError: If it cannot be kept either.
    """
    before = Delivery([], 0, None)
    try:
        before = deliver(tracking)
        run_id = _log(tracking, run)
    except TrackingError as error:
        keep(run)
        return Outcome(None, len(before.delivered), error)
    except OSError as error:
        keep(run)
        refusal = TrackingError(
            failure_of(error), f"expected to read the runs that wait, found {error}"
        )
        return Outcome(None, len(before.delivered), refusal)
    return Outcome(run_id, len(before.delivered))


def log_failure(tracking: Tracking, run: Run) -> Outcome:
    """Log the run of a failed stage as `log_or_keep` does.

    Where there is no database yet, it is kept for the first stage that makes something: a stage
    that fails at once should not take seconds to make tables.
    """
    database = database_file(tracking.uri)
    if database is not None and not database.exists():
        keep(run)
        return Outcome(None)
    return log_or_keep(tracking, run)


def _log(tracking: Tracking, run: Run) -> str:
    arguments = {name: getattr(run, name) for name in Run.__dataclass_fields__}
    return log_run(tracking, **arguments)


def _folder() -> Path:
    return events_root() / FOLDER / UNDELIVERED


def keep(run: Run) -> None:
    """Keep a run for later, as of this commit and person. The same one twice is kept once."""
    run.origin = run.origin or origin_tags(run.tags.get("stage"))
    values = redacted(asdict(run) | {"files": [Path(file).name for file in run.files]})
    name = f"{int(1000 * run.logged):015d}-{sha256_json(values)[:12]}"
    with atomic_folder(_folder() / name) as folder:
        write_json(folder / RUN, values)
        for file in run.files:
            (folder / FILES).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / FILES / Path(file).name)


def kept() -> Iterator[tuple[Path, Run]]:
    """Yield the folder and the content of each run that waits, the oldest first.

    Raises:
        OSError: If one cannot be read now.
    """
    for path in sorted(_folder().glob(f"[0-9]*/{RUN}")):
        folder = path.parent
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["files"] = [_copy_of(folder, name) for name in values["files"]]
            values["datasets"] = [Dataset(**dataset) for dataset in values["datasets"]]
            if values.get("model"):
                values["model"] = BundleDescription(**values["model"])
            yield folder, Run(**values)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise_if_of_machine(error)
            continue  # none of ours


def waiting() -> list[str]:
    """Return the names of the folders of what is kept, the oldest first."""
    return sorted(path.parent.name for path in _folder().glob(f"[0-9]*/{RUN}"))


def _copy_of(folder: Path, name: str) -> Path:
    """Return the copy of a run's file. Raises ValueError for a name that leads elsewhere."""
    if name != Path(name).name:
        raise ValueError(f"expected the name of a file, found {name!r}")
    return folder / FILES / name


def deliver(tracking: Tracking) -> Delivery:
    """Deliver the runs that were kept; those that MLflow refuses stay.

    One process does so at a time: a run that two deliver is there once, but its copies of files
    would be taken away from under one of them.

    Raises:
        TrackingError: If the store takes nothing at all now.
    """
    if not waiting():
        return Delivery([], 0, None)
    with FileLock(_folder().parent / LOCK):
        return _deliver(tracking)


def _deliver(tracking: Tracking) -> Delivery:
    delivered = []
    left = 0
    refused = None
    for folder, run in kept():
        try:
            _log(tracking, run)
        except TrackingError as error:
            if error.failure is not Failure.TRACKING_REFUSED:
                raise
            left += 1
            refused = error
            continue
        shutil.rmtree(folder, ignore_errors=True)
        delivered.append(run)
    return Delivery(delivered, left, refused)
