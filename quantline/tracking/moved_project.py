"""What an MLflow database knows of its project's folder, after the project was moved or copied.

MLflow keeps whole addresses of a run's files and of a version's bundle. In a copy of the project
they would be those of the original: runs would be written into it, and the champion would be its
bundle, whatever that holds by now.
"""

import json
import sqlite3
from pathlib import Path

from quantline.files import write_json

RUN_FILES = "mlartifacts"  # the folder of a project in which runs keep their files
# In the project of a database: the folders of other projects that log to it.
GUESTS = Path(".quantline/mlflow-guests.json")
# Where addresses below the project's folder stand.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def note_guest(root: Path, guest: Path) -> None:
    """Write down that a project logs to another's database: its addresses are its own.

    Args:
        root: The folder of the project in which the database lies.
        guest: That of the other.
    """
    known = guests(root)
    if str(guest) not in known:
        write_json(root / GUESTS, sorted([*known, str(guest)]))


def guests(root: Path) -> list[str]:
    """Return the folders of the projects that log to a project's database."""
    try:
        found = json.loads((root / GUESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [str(one) for one in found]


def follow_project(database: sqlite3.Connection, root: Path) -> None:
    """Let addresses below the folder where the project was lead to where it is.

    Those of other projects that log to its database stay.

    Args:
        database: Of MLflow, inside a transaction. One that has other tables is left alone.
        root: The project's folder, in which the database lies.

    Raises:
        sqlite3.Error: If the database does not take it.
    """
    tables = {name for (name,) in database.execute("select name from sqlite_master")}
    if not {table for table, _ in PLACES} <= tables:
        return
    ending = f"/{RUN_FILES}"
    here = root.as_uri()
    stay = {here, *(Path(guest).as_uri() for guest in guests(root))}
    query = "select distinct artifact_location from experiments where artifact_location like ?"
    for (location,) in database.execute(query, (f"file://%{ending}",)).fetchall():
        there = location.removesuffix(ending)
        if there in stay:
            continue
        for table, column in PLACES:
            database.execute(
                f"update {table} set {column} = ? || substr({column}, ?) "
                f"where substr({column}, 1, ?) = ?",
                (here, len(there) + 1, len(there) + 1, f"{there}/"),
            )
