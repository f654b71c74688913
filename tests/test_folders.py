"""Folders that appear whole or not at all, and go on where a killed run stopped."""

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantline import durable
from quantline.errors import Failure, StageError
from quantline.files import write_json
from quantline.folders import atomic_folder, resumable_folder
from tests.helpers.project import ROOT

# Ends without the chance to tidy up, as a process does that the system kills.
KILLED = """
import os
from pathlib import Path
from quantline.folders import atomic_folder

with atomic_folder(Path("made")) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), 9)
"""


class Killed(BaseException):
    """Stands in for a kill, after which no code of the library may tidy up."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_folder_replaces_the_old_folder_as_a_whole(tmp_path):
    target = tmp_path / "made"
    for name in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
            assert not (target / "new").exists()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["made"]


def test_atomic_folder_keeps_the_old_folder_after_a_failure(tmp_path):
    target = tmp_path / "made"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        raise ZeroDivisionError
    assert (target / "old").read_text() == "old"
    assert len(names(tmp_path)) == 1


def test_atomic_folder_removes_what_a_killed_run_left(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == -9
    assert not (tmp_path / "made").exists()
    assert names(tmp_path)
    with atomic_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == ["made"]


def test_atomic_folder_makes_files_readable_and_leaves_hard_links_alone(tmp_path):
    source = tmp_path / "source"
    source.write_text("the user's own")
    source.chmod(0o600)
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "private").write_text("x")
        (folder / "private").chmod(0o600)
        os.link(source, folder / "link")
    assert (tmp_path / "made/private").stat().st_mode & 0o777 == 0o644
    assert source.stat().st_mode & 0o777 == 0o600


def killed_run(target: Path, key: dict, announced: list[str]) -> None:
    """Begin to make a folder, and end as if killed: the partial folder stays as it was."""
    partial = target.parent / f".{target.name}.partial"
    aside = target.parent / "aside"
    with resumable_folder(target, key, announced.append) as folder:
        (folder / "half").write_text("written before the kill")
        shutil.copytree(partial, aside)
    shutil.rmtree(target)
    aside.rename(partial)
    note = {"key": key, "inode": partial.stat().st_ino}
    write_json(target.parent / f".{target.name}.partial.json", note)


def test_resumable_folder_continues_a_killed_run_with_the_same_key(tmp_path):
    target = tmp_path / "made"
    announced = []
    killed_run(target, {"seed": 1}, announced)
    assert announced == []
    with resumable_folder(target, {"seed": 1}, announced.append) as folder:
        assert (folder / "half").read_text() == "written before the kill"
        assert not target.exists()
    assert announced == ["resumes where a killed run stopped"]
    assert names(target) == ["half"]
    assert names(tmp_path) == ["made"]


def test_resumable_folder_starts_over_when_the_key_changed(tmp_path):
    target = tmp_path / "made"
    announced = []
    killed_run(target, {"seed": 1, "text": "a", "code": "c"}, announced)
    with resumable_folder(target, {"seed": 2, "code": "c"}, announced.append) as folder:
        assert names(folder) == []
    assert announced == ["starts over, because seed, text changed since a run was killed"]


def test_resumable_folder_starts_over_when_the_key_is_damaged(tmp_path):
    target = tmp_path / "made"
    announced = []
    killed_run(target, {"seed": 1}, announced)
    (tmp_path / ".made.partial.json").write_text("{")
    with resumable_folder(target, {"seed": 1}, announced.append) as folder:
        assert names(folder) == []
    assert announced == ["starts over, because seed changed since a run was killed"]


def test_resumable_folder_keeps_work_whose_key_cannot_be_read_now(tmp_path, monkeypatch):
    target = tmp_path / "made"
    killed_run(target, {"seed": 1}, [])

    def too_many(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", too_many)
        with (
            pytest.raises(OSError, match="Too many open files"),
            resumable_folder(target, {"seed": 1}, print),
        ):
            pytest.fail("it began")
    with resumable_folder(target, {"seed": 1}, print) as folder:
        assert names(folder) == ["half"]


@pytest.mark.parametrize("error", [OSError(28, "full"), StageError(Failure.DISK_FULL, "full")])
def test_resumable_folder_goes_on_after_a_full_disk(tmp_path, error):
    announced: list[str] = []
    target = tmp_path / "made"
    with pytest.raises(type(error)), resumable_folder(target, {}, print) as folder:
        (folder / "half").write_text("hours of work")
        raise error
    with resumable_folder(target, {}, announced.append) as folder:
        assert names(folder) == ["half"]
    assert announced == ["resumes where a killed run stopped"]
    assert names(tmp_path) == ["made"]


def test_resumable_folder_starts_over_in_a_folder_that_is_another(tmp_path):
    target = tmp_path / "made"
    announced: list[str] = []
    killed_run(target, {"seed": 1}, announced)
    partial = tmp_path / ".made.partial"
    shutil.copytree(partial, tmp_path / "copy")
    shutil.rmtree(partial)
    (tmp_path / "more").mkdir()  # takes the number that is free now
    (tmp_path / "copy").rename(partial)
    with resumable_folder(target, {"seed": 1}, announced.append) as folder:
        assert names(folder) == []
    assert announced == ["starts over, because the folder changed since a run was killed"]


def test_atomic_folder_puts_back_what_a_killed_run_had_put_aside(tmp_path):
    aside = tmp_path / ".made.0123abcd"
    (aside / "old").mkdir(parents=True)
    (aside / "old/file").write_text("of the old artifact")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "made"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["made"]
    assert (tmp_path / "made/file").read_text() == "of the old artifact"


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o000])
def test_folders_and_files_keep_the_users_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "made") as folder:
            (folder / "private").write_text("x")
            (folder / "private").chmod(0o600)
            write_json(folder / "inner/x.json", {})
        with resumable_folder(tmp_path / "resumed", {}, print) as folder:
            (folder / "file").write_text("x")
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


def test_resumable_folder_keeps_nothing_after_an_error_and_everything_after_a_kill(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ZeroDivisionError), resumable_folder(target, {}, print) as folder:
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with pytest.raises(Killed), resumable_folder(target, {}, print) as folder:
        (folder / "half").write_text("x")
        raise Killed
    assert names(tmp_path) == [".made.partial", ".made.partial.json"]


STEPS = (
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (durable, "_exchange"),
    (Path, "unlink"),
    (shutil, "rmtree"),
)


def cannot_exchange(*names: Path) -> bool:
    """Stand in for a file system that cannot let two names change places."""
    return False


def end_of_a_run(folder: Path, number: int, before: bool) -> int:
    """Make folder/made again, and let the process end before or after a step of the end.

    Returns:
        How many steps there were.
    """
    target = folder / "made"
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        steps: list[str] = []
        with resumable_folder(target, {"seed": 1}, print) as made:
            (made / "hours").write_text("of work")
            (made / ".temporary").write_text("half")
            for owner, name in STEPS:
                patch.setattr(owner, name, killed_at(owner, name, steps, number, before))
    return len(steps)


def killed_at(owner: Any, name: str, steps: list[str], number: int, before: bool) -> Any:
    """Return a file operation that ends the process if it is the one with this number."""
    original = getattr(owner, name)

    def step(*arguments, **options):
        here = len(steps)
        steps.append(name)
        if here == number and before:
            raise Killed
        result = original(*arguments, **options)
        if here == number:
            raise Killed
        return result

    return step


@pytest.mark.parametrize("exchange", [True, False])
def test_resumable_folder_survives_a_kill_at_every_step_of_its_end(tmp_path, exchange, monkeypatch):
    """Whenever the end is cut off, the next run finds the work done, or the folder in place."""
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", cannot_exchange)
    steps = end_of_a_run(tmp_path / "whole", -1, before=True)
    assert steps >= 7
    for number, before in itertools.product(range(steps), (True, False)):
        folder = tmp_path / f"{number}-{before}"
        assert end_of_a_run(folder, number, before) == number + 1
        target = folder / "made"
        announced: list[str] = []
        with resumable_folder(target, {"seed": 1}, announced.append) as made:
            assert not (made / ".temporary").exists()
            if announced:
                assert announced == ["resumes where a killed run stopped"]
                assert (made / "hours").read_text() == "of work"
            else:
                assert (target / "hours").read_text() == "of work"
            (made / "hours").write_text("of work")
        assert "hours" in names(target)
        assert names(folder) == ["made"]


class LibraryError(Exception):
    """What a library in Rust raises for an error of the system."""


@pytest.mark.parametrize(
    ("words", "kept"), [("I/O error: File too large (os error 27)", True), ("a bad header", False)]
)
def test_resumable_folder_keeps_what_is_done_when_a_library_says_that_the_disk_is_full(
    tmp_path, words, kept
):
    def attempt() -> list[str]:
        with resumable_folder(tmp_path / "out", {"a": 1}, lambda said: None) as folder:
            there = sorted(path.name for path in folder.iterdir())
            (folder / "done").write_text("x")
            if not there:
                raise LibraryError(words)
            return there

    with pytest.raises(LibraryError):
        attempt()
    if kept:
        assert attempt() == ["done"]
    else:
        with pytest.raises(LibraryError):
            attempt()
