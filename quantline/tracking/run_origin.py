"""Where a run comes from: the person, the program and the commit, as MLflow's users expect them."""

import getpass
import subprocess

from quantline.errors import REASON_OF_STAGE
from quantline.messages import without_secrets

SOURCES = ("conf", "demo", "dvc.yaml", "hydra_plugins", "quantline", "stages")
STATUS_WIDTH = 3  # of what git says of a file before its path
UNKNOWN = "unknown"


def origin_tags(stage: str | None) -> dict[str, str]:
    """Return the tags that MLflow shows as a run's user and source, and its commit.

    Args:
        stage: The stage that logs the run.
    """
    commit = git_commit()
    tags = {
        "mlflow.user": user_name(),
        "mlflow.source.name": f"stages/{stage}.py" if stage in REASON_OF_STAGE else "quantline",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "git_commit": commit,
    }
    optional = {
        "mlflow.source.git.branch": _git("symbolic-ref", "--quiet", "--short", "HEAD"),
        "mlflow.source.git.repoURL": _git("remote", "get-url", "origin"),
    }
    return tags | {key: without_secrets(value) for key, value in optional.items() if value}


def user_name() -> str:
    """Return the name by which the operating system knows the person; "unknown" if by none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no entry for the user
        return UNKNOWN


def git_commit() -> str:
    """Return the commit that is checked out; "unknown" outside git."""
    return _git("rev-parse", "HEAD") or UNKNOWN


def _git(*arguments: str) -> str:
    """Return what a command of git says; "" where it cannot."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def uncommitted_files() -> list[str]:
    """Return the files that figures come from and that no commit has as they are now.

    What runs write, such as params.yaml and dvc.lock, does not count; the page has the parameters.
    """
    command = ["git", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all"]
    try:
        done = subprocess.run([*command, "--", *SOURCES], capture_output=True, check=True)
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError):
        return []
    entries = done.stdout.decode("utf-8", "backslashreplace").split("\0")
    return [entry[STATUS_WIDTH:] for entry in entries if entry]
