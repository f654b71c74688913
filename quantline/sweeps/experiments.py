"""Experiments of DVC: their names and commits, and which of a sweep there are already.

An experiment that has run is not run again while its parameters, the code and the user's files are
the same. Nothing is ever removed or replaced: where a name is taken, the next one gets a number.
"""

import itertools
import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantline.config.copied_project import paths_outside_copy
from quantline.errors import ConfigError, Failure
from quantline.files import read_json, sha256_files, sha256_json, write_json
from quantline.run.project_lock import FOLDER
from quantline.sweeps.plan import Point
from quantline.sweeps.space import Space

SWEEPS = FOLDER / "sweeps"
SPACE = "space.json"  # in a sweep's folder there
# What experiments run: with other content of these they are others.
SOURCES = ("conf", "demo", "dvc.yaml", "hydra_plugins", "quantline", "stages")
WATCHED = (
    ("model", "watch"),
    ("model", "adapter_watch"),
    ("calibration", "watch"),
    ("evaluation", "watch"),
    ("evaluation", "gold_watch"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment.

    Attributes:
        experiment: Its name in DVC.
        rev: Its commit; None if it failed.
        failure: The failure's name; None if it did not fail.
        message: The same in words.
        seconds: How long it ran.
        failures: Recipe or variant → (failure, message), of those that failed in an experiment
            that goes on without them.
    """

    experiment: str
    rev: str | None = None
    failure: str | None = None
    message: str = ""
    seconds: float = 0.0
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)


def sweep_called(name: str, space: Space, is_search: bool, root: Path) -> str:
    """Return a name that no other sweep of this project has: a number follows one that is taken.

    A sweep is another one if it varies other keys, overrides something else in all experiments, or
    is a search where the other is a grid. With more values of the same keys it goes on.

    Args:
        name: What it would be called.
        space: What it varies.
        is_search: Whether it is a search.
        root: The project's.
    """
    wanted = _identity(space, is_search)
    for number in itertools.count(1):
        called = name if number == 1 else f"{name}-{number}"
        kept = root / SWEEPS / called / SPACE
        if not kept.is_file() or read_json(kept) == wanted:
            return called
    raise AssertionError("there are numbers enough")


def keep_space(name: str, space: Space, is_search: bool, root: Path) -> None:
    """Keep what a sweep varies, for `sweep_called`."""
    folder = root / SWEEPS / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPACE, _identity(space, is_search))


def _identity(space: Space, is_search: bool) -> dict[str, Any]:
    keys = sorted(axis.key for axis in space.axes)
    return {"fixed": sorted(space.fixed), "keys": keys, "search": is_search}


class Finished:
    """The experiments of a sweep that have run, kept on disk so that a sweep can be continued."""

    def __init__(self, sweep: str, root: Path) -> None:
        """Read what is there of a sweep."""
        self._path = root / SWEEPS / sweep / "experiments.json"
        self._root = root
        self._content: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self._content = {key: dict(value) for key, value in content.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            pass  # none yet, or torn: they run again
        self._sources = sources_digest(root)

    def _key(self, point: Point, variants: Iterable[str]) -> str:
        inputs = {}
        for section, key in WATCHED:
            path = point.composed[section].get(key)
            inputs[f"{section}.{key}"] = _stamp(self._root, path) if path else None
        return sha256_json([point.composed, self._sources, inputs, sorted(variants)])

    def find(self, point: Point, variants: Iterable[str]) -> Outcome | None:
        """Return the outcome of an experiment that need not run again; None if it has to."""
        try:
            outcome = Outcome(**self._content[self._key(point, variants)])
        except (KeyError, TypeError):
            return None
        if outcome.rev is None or not _git(self._root, "cat-file", "-t", f"{outcome.rev}^0"):
            return None
        return outcome

    def add(self, point: Point, variants: Iterable[str], outcome: Outcome) -> None:
        """Keep the outcome of an experiment that has run well."""
        self._content[self._key(point, variants)] = asdict(outcome)
        write_json(self._path, self._content)


def sources_digest(root: Path) -> str:
    """Return the sha256 over the files that experiments run, as they are in the workspace."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES)
    paths = [root / name for name in sorted(set(listed.split("\0"))) if name]
    return sha256_files(root, [path for path in paths if path.is_file()])


def _stamp(root: Path, name: str) -> str:
    """Return what shows that one of the user's files, or one of a folder, was replaced."""
    path = root / name
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = {}
    for file in files:
        if file.is_file():
            status = file.stat()
            found[str(file)] = [status.st_size, status.st_mtime_ns]
    return sha256_json(found)


def names_taken(root: Path) -> set[str]:
    """Return the names of the experiments on the commit that is checked out."""
    refs = _git(root, "for-each-ref", "--format=%(refname)", _prefix(root))
    return {ref.rpartition("/")[2] for ref in refs.splitlines()}


def find_rev(root: Path, experiment: str) -> str | None:
    """Return the commit of an experiment on the commit that is checked out."""
    ref = f"{_prefix(root)}/{experiment}"
    return _git(root, "rev-parse", "--quiet", "--verify", f"{ref}^0").strip() or None


def free_name(label: str, taken: Iterable[str]) -> str:
    """Return a name that no experiment has: the label, with a number if need be."""
    names = (label if number == 1 else f"{label}-{number}" for number in itertools.count(1))
    known = set(taken)
    return next(name for name in names if name not in known)


def check_git(root: Path) -> None:
    """Check that DVC can make experiments. Raises ConfigError."""
    if not _git(root, "rev-parse", "--quiet", "--verify", "HEAD"):
        raise ConfigError(
            f"expected a git repository with a commit in {root}, found none: DVC keeps experiments "
            "in git; run `git init`, `git add --all` and `git commit`"
        )


def untracked_sources(root: Path) -> list[str]:
    """Return the files, and whole folders, that experiments run and git does not have.

    DVC copies into an experiment what git has; these have to be named.
    """
    listed = _git(
        root, "ls-files", "-z", "--others", "--exclude-standard", "--directory", "--", *SOURCES
    )
    return [name.rstrip("/") for name in listed.split("\0") if name]


def expected_params(point: Point, root: Path) -> dict[str, Any]:
    """Return the params.yaml that an experiment's copy has, which finds the user's files."""
    values = json.loads(json.dumps(point.composed))
    for key, path in paths_outside_copy(point.composed, root).items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = path
    return dict(values)


def read_params(root: Path, rev: str) -> dict[str, Any]:
    """Return the params.yaml of a commit."""
    import yaml

    values = yaml.safe_load(_git(root, "show", f"{rev}:params.yaml") or "{}")
    return values if isinstance(values, dict) else {}


def check_params(point: Point, rev: str, root: Path) -> Outcome | None:
    """Return a failure if an experiment did not run with the parameters that were asked for.

    A sweep that measured the repository's own model in place of the project's would have no other
    sign of it.
    """
    expected = expected_params(point, root)
    found = read_params(root, rev)
    wrong = sorted(key for key in expected if found.get(key) != expected[key])
    if not wrong:
        return None
    message = (
        f"expected an experiment with the parameters that were asked for, found others in "
        f"{', '.join(wrong)}; run the sweep again while nothing else changes conf/"
    )
    return Outcome(point.label, failure=Failure.CONFIG_STALE, message=message)


def _prefix(root: Path) -> str:
    commit = _git(root, "rev-parse", "HEAD").strip()
    return f"refs/exps/{commit[:2]}/{commit[2:]}"


def _git(root: Path, *arguments: str) -> str:
    """Return what git says; "" if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except (FileNotFoundError, PermissionError):
        return ""
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else ""
