"""DVC keeps what it refuses, and needs no git."""

import json
import logging
import os
import subprocess
import sys

import pytest

from quantline.run.dvc_program import WARNINGS_ALONE, KeepRefusals, has_git
from tests.helpers.project import ROOT

PIPELINE = """
stages:
  fails: {cmd: "exit 3"}
  goes: {cmd: echo done > made, outs: [made]}
  wants@this: {cmd: echo, deps: [nowhere]}
"""


def dvc(folder, *arguments: str) -> tuple[int, list]:
    command = [sys.executable, "-m", "quantline.run.dvc_program", "refusals.json", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        check=False,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "true"},
    )
    return done.returncode, json.loads((folder / "refusals.json").read_text())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").touch()
    (tmp_path / "dvc.yaml").write_text(PIPELINE.replace("wants@this", "wants"))
    return tmp_path


def test_dvc_without_git_runs_and_keeps_what_it_refuses(folder):
    assert not has_git(folder)
    code, refusals = dvc(folder, "repro", "--keep-going")
    assert code != 0
    assert (folder / "made").read_text() == "done\n"
    ((stage, said),) = refusals  # a stage that ran and failed says so itself
    assert stage == "wants"
    assert said == "dependency 'nowhere' does not exist"
    (folder / "dvc.yaml").write_text("stages: [")
    code, refusals = dvc(folder, "repro")
    assert code != 0
    assert refusals[0][0] is None
    assert "dvc.yaml" in refusals[0][1]


def test_what_stops_all_of_dvc_is_kept_with_its_cause():
    keep = KeepRefusals()
    try:
        try:
            raise OSError("held by process 12")
        except OSError as cause:
            raise RuntimeError("unable to acquire lock") from cause
    except RuntimeError:
        record = logging.LogRecord("dvc", logging.ERROR, "", 0, "", None, sys.exc_info())
    keep.emit(record)
    assert keep.refusals == [(None, "unable to acquire lock: held by process 12")]


def test_dvc_can_leave_out_what_is_less_than_a_warning(folder):
    command = [sys.executable, "-m", "quantline.run.dvc_program", "refusals.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "true"}
    for stage, refused in (("goes", []), ("wants", ["wants"])):
        arguments = [WARNINGS_ALONE, "repro", "--single-item", stage]
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.stdout == ""
        found = json.loads((folder / "refusals.json").read_text())
        assert [name for name, _ in found] == refused
        assert ("does not exist" in done.stderr) == bool(refused)


STAGES = """
stages:
  first: {cmd: echo 1 > one, outs: [one], params: [values]}
  second: {cmd: "cat one > two", deps: [one], outs: [two]}
"""
VALUES = {
    "nothing": None,
    "words": ["a: b", "'quoted'", "1.0", "yes", "", "umlaut ä", "- dash"],
    "long": "of " * 60,
    "digest": "0123456789abcdef" * 4,
    "numbers": [1, 1.5, 1e-9, True],
    "deep": {"empty": {}, "none": []},
}


def test_dvc_lock_is_the_text_that_dvc_alone_would_write(folder):
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "params.yaml").write_text(json.dumps({"values": VALUES}))
    assert dvc(folder, "repro") == (0, [])  # writes it once for each stage
    ours = (folder / "dvc.lock").read_text()
    assert "umlaut ä" in ours and "second" in ours
    (folder / "dvc.lock").unlink()
    (folder / "one").unlink()
    (folder / "two").unlink()
    subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--force"],
        cwd=folder,
        check=True,
        capture_output=True,
        env=os.environ | {"DVC_SYSTEM_CONFIG_DIR": str(no_git(folder))},
    )
    assert (folder / "dvc.lock").read_text() == ours


def no_git(folder):
    system = folder.parent / "system"
    system.mkdir()
    (system / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    return system


def test_dvc_lock_is_read_in_c():
    from ruamel.yaml import __with_libyaml__

    assert __with_libyaml__  # params.yaml too, once for each stage: ten times as fast
