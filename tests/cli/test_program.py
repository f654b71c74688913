"""Modules that a command runs: with this Python, and none of them outlives the command."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from quantline.cli import program
from quantline.run.leash import is_running
from tests.helpers.project import ROOT


def test_run_takes_this_python_where_no_environment_is_active(folder, monkeypatch):
    calls: list[tuple[list[str], dict[str, str]]] = []
    start = subprocess.Popen

    def stand_in_for(command, env, preexec_fn):
        calls.append((command, env))
        return start([sys.executable, "-c", "raise SystemExit(3)"], preexec_fn=preexec_fn)

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(subprocess, "Popen", stand_in_for)
    assert program.run_module("dvc", "repro") == 3
    ((command, environment),) = calls
    assert command == [sys.executable, "-m", "dvc", "repro"]
    first = environment["PATH"].split(os.pathsep)[0]
    assert first == str(Path(sys.executable).parent)


# A module that starts a stage which tidies up when it is asked to, and another that does not react.
TREE = """
import subprocess
import sys

CODE = "import signal, time; signal.signal(signal.SIGTERM, {}); print(1, flush=True); {}"
tidy = "lambda *_: (open('tidied', 'w').close(), sys.exit())"
kinds = [(tidy, "import sys; time.sleep(600)"), ("signal.SIG_IGN", "time.sleep(600)")]
for kind in kinds:
    stage = subprocess.Popen([sys.executable, "-c", CODE.format(*kind)], stdout=subprocess.PIPE)
    stage.stdout.readline()
open("ready", "w").close()
stage.wait()
"""
RUN = """
import signal
import typer
from quantline.cli import program
from quantline.run import process_tree

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

process_tree.TIDY_S = 1.0
try:
    with program.ends_in_one_line():
        program.run_module("tree")
except typer.Exit as end:
    raise SystemExit(end.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_run_leaves_nothing_running_when_it_is_asked_to_end(folder, number):
    (folder / "tree.py").write_text(TREE)
    run = subprocess.Popen(
        [sys.executable, "-c", RUN],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while not (folder / "ready").exists():
        assert run.poll() is None
        time.sleep(0.02)
    members = psutil.Process(run.pid).children(recursive=True)
    assert len(members) == 3
    run.send_signal(number)
    if number == signal.SIGKILL:
        run.wait()
        while is_running(members[0]):  # stages look after themselves
            time.sleep(0.02)
        for member in members[1:]:
            member.kill()
        return
    _, words = run.communicate()
    assert run.returncode == 128 + number
    assert "nothing is running any more; run the same command again: finished stages" in words
    assert (folder / "tidied").exists()
    assert not any(is_running(member) for member in members)


def test_a_reader_that_has_read_enough_is_no_error(capsys):
    """As `head` is: `quantline init --help | head -1`."""
    app = typer.Typer(cls=program.Program)

    @app.command()
    def one() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    @app.command()
    def other() -> None:
        """Typer makes no group of a single command."""

    done = CliRunner().invoke(app, ["one"])
    assert (done.exit_code, done.output, capsys.readouterr().err) == (1, "", "")
