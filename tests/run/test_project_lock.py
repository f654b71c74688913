"""One run in a project at a time."""

import os
import subprocess
import sys

import pytest

from quantline.errors import BusyError
from quantline.run.project_lock import HELD, project_lock
from tests.helpers.project import ROOT

HOLD = """
import sys
from quantline.run.project_lock import project_lock
with project_lock("quantline repro"):
    print("held", flush=True)
    sys.stdin.readline()
"""
TAKE = """
from quantline.errors import BusyError
from quantline.run.project_lock import project_lock
try:
    with project_lock("quantline compose"):
        print("taken")
except BusyError as error:
    print(error)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(HELD, raising=False)
    return tmp_path


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def test_project_lock_refuses_a_second_process_and_says_who_holds_it(folder):
    with python(HOLD) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError) as caught, project_lock("quantline compose"):
            pass
        message = str(caught.value)
        assert f"`quantline repro` (process {holder.pid}, since 20" in message
        assert "wait until it has ended" in message
        holder.communicate("\n")
    with project_lock("quantline compose"):
        pass


def test_project_lock_is_free_after_a_kill(folder):
    with python(HOLD) as holder:
        holder.stdout.readline()
        holder.kill()
    with project_lock("quantline compose"):
        pass


def test_project_lock_lets_in_what_it_has_started(folder):
    with project_lock("quantline repro"):
        with project_lock("calibrate"):
            pass
        with python(TAKE) as child:
            assert child.stdout.read() == "taken\n"
        with python(TAKE, **{HELD: f"{os.getpid()}:/another/project"}) as stranger:
            assert "`quantline repro`" in stranger.stdout.read()


def test_project_lock_is_of_one_project(folder, monkeypatch):
    with project_lock("quantline repro"):
        (folder / "other").mkdir()
        monkeypatch.chdir(folder / "other")
        with project_lock("quantline compose"):
            assert os.environ[HELD] == f"{os.getpid()}:{folder / 'other'}"
