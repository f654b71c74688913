"""Folders and files that appear whole or not at all, their hashes, and JSON."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.errors import Failure, StageError
from quantline.files import (
    atomic_folder,
    describe_files,
    folder_bytes,
    read_json,
    read_json_list,
    resumable_folder,
    sha256_file,
    sha256_files,
    sha256_json,
    stamp,
    versions,
    write_json,
    write_tensors,
    write_text,
)
from tests.helpers.project import ROOT

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256 of "abc"
# Ends without the chance to tidy up, as a process does that the system kills.
KILLED = """
import os
from pathlib import Path
from quantline.files import atomic_folder

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
    write_json(target.parent / f".{target.name}.partial.json", key)


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


def test_resumable_folder_keeps_nothing_after_an_error_and_everything_after_a_kill(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ZeroDivisionError), resumable_folder(target, {}, print) as folder:
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with pytest.raises(Killed), resumable_folder(target, {}, print) as folder:
        (folder / "half").write_text("x")
        raise Killed
    assert names(tmp_path) == [".made.partial", ".made.partial.json"]


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": {1, 2}}])
def test_write_json_refuses_what_json_lacks_and_writes_nothing(tmp_path, value):
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", value)
    assert names(tmp_path) == []


def test_write_json_sorts_keys_and_keeps_letters(tmp_path):
    write_json(tmp_path / "folder/x.json", {"b": "é", "a": [1]})
    text = (tmp_path / "folder/x.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'
    assert names(tmp_path / "folder") == ["x.json"]


@pytest.mark.parametrize("order", ["C", "F"])
def test_write_tensors_reads_back_whatever_the_order_in_memory(tmp_path, order):
    generator = np.random.default_rng(0)
    tensors = {
        "matrix": np.asarray(generator.normal(size=(3, 5)), order=order),
        "transposed": generator.normal(size=(4, 2, 3)).astype(np.float16).transpose(2, 0, 1),
        "every second": np.arange(10)[::2],
        "number": np.array(3.5),
    }
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(read[name], values)
        assert read[name].shape == values.shape


def test_write_text_replaces_a_file(tmp_path):
    for text in ("old", "new"):
        write_text(tmp_path / "x", text)
        assert (tmp_path / "x").read_text() == text
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("read", "right", "wrong", "kind"),
    [(read_json, {"a": 1}, [1], "object"), (read_json_list, [1], {"a": 1}, "array")],
)
def test_read_json_refuses_what_is_absent_damaged_or_of_another_kind(
    tmp_path, read, right, wrong, kind
):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(right))
    assert read(path) == right
    for content in (None, b"{", b"\xff", json.dumps(wrong).encode()):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StageError, match=f"expected a JSON {kind} in ") as error:
            read(path)
        assert error.value.failure == Failure.MISSING_FILE
        path.touch()


def test_sha256_names_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == ABC
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1, "b": 2}) != sha256_json({"a": 1})
    assert describe_files(tmp_path, ["x"]) == {"x": {"sha256": ABC, "bytes": 3}}


def test_sha256_files_depends_on_names_bytes_and_where_a_file_ends(tmp_path):
    digests = set()
    for files in ({"a": "xy", "b": "z"}, {"a": "x", "b": "yz"}, {"a": "xy", "c": "z"}):
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        paths = sorted(folder.iterdir())
        digests.add(sha256_files(folder, paths))
        assert sha256_files(folder, paths) in digests
    assert len(digests) == 3


def test_stamp_shows_that_a_file_was_replaced(tmp_path):
    path = tmp_path / "x"
    path.write_text("abc")
    before = stamp([path, path])
    assert before == {"x": [3, path.stat().st_mtime_ns]}
    os.utime(path, ns=(1, 1))
    assert stamp([path]) != before


def test_folder_bytes_adds_up_the_files_that_match(tmp_path):
    write_text(tmp_path / "a.bin", "abc")
    write_text(tmp_path / "inner/b.txt", "de")
    assert folder_bytes(tmp_path) == 5
    assert folder_bytes(tmp_path, "*.txt") == 2


def test_versions_are_those_of_the_installed_packages():
    found = versions("numpy", "no-such-package")
    assert found["no-such-package"] == "absent"
    assert found["numpy"][0].isdigit()


STEPS = ((os, "rename"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree"))


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


def test_resumable_folder_survives_a_kill_at_every_step_of_its_end(tmp_path):
    """Whenever the end is cut off, the next run finds the work done, or the folder in place."""
    steps = end_of_a_run(tmp_path / "whole", -1, before=True)
    assert steps >= 4
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
