"""Which paths of a project a copy of it does not have: only what git and DVC keep comes along."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.config.overrides import is_path
from quantline.config.stale import flatten


def paths_outside_copy(composed: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Return which paths a copy of the project would not have.

    Args:
        composed: Parameters.
        root: The project's.

    Returns:
        Key → the whole path. Those are left out that are whole already, that git has, and that are
        not there at all.
    """
    found = {}
    values = flatten(dict(composed))
    for key, value in values.items():
        watched = key.endswith("watch") and value in _typed(values)
        if not (is_path(key) or watched) or not isinstance(value, str) or not value:
            continue
        path = root / value
        if Path(value).is_absolute() or not path.exists() or _is_in_git(root, value):
            continue
        found[key] = str(path.resolve())
    return found


def _typed(values: Mapping[str, Any]) -> set[Any]:
    """Return the values of the keys that hold paths."""
    return {value for key, value in values.items() if is_path(key) and isinstance(value, str)}


def _is_in_git(root: Path, path: str) -> bool:
    """Whether git has all of a file or folder of the project."""
    listed = []
    for kind in ("--cached", "--others"):
        command = ["git", "ls-files", "-z", kind, "--", f":(literal){path}"]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, check=False)
        except (FileNotFoundError, PermissionError):  # no git
            return False
        if done.returncode:
            return False
        listed.append(bool(done.stdout))
    return listed == [True, False]
