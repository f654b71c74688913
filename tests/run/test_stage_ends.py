"""How a stage ends before its time: Ctrl-C, a request, limits, its starter's death, a full disk."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantline.config.compose import as_yaml, compose
from quantline.run import watchdog
from quantline.run.stage import StageRun, stage_run
from tests.helpers.full_disk import largest_file
from tests.helpers.project import ROOT, read_events


def test_stage_run_leaves_nothing_when_it_is_interrupted(folder):
    with (
        pytest.raises(SystemExit) as stopped,
        stage_run("load") as run,
        run.output("artifacts/made"),
    ):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert list(Path("artifacts").iterdir()) == []
    event = read_events(folder)[-1]
    assert event["payload"]["failure"] == "interrupted"
    assert event["summary"] == (
        "load was stopped by Ctrl-C; run the same command again: finished stages are kept"
    )


def test_stage_run_ends_and_says_so_when_it_is_asked_to(folder):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as stopped,
        stage_run("load") as run,
        run.output("artifacts/made"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert stopped.value.code == 143
    assert list(Path("artifacts").iterdir()) == []
    assert read_events(folder)[-1]["payload"]["failure"] == "interrupted"
    assert "asked to end (SIGTERM)" in read_events(folder)[-1]["summary"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("limits", "failure"),
    [("limits.seconds=0.2", "timed_out"), ("limits.memory_mib=1", "out_of_memory")],
)
def test_stage_run_ends_within_its_limits(folder, limits, failure, monkeypatch):
    monkeypatch.setattr(watchdog, "POLL_S", 0.05)
    Path("params.yaml").write_text(as_yaml(compose(["suite=quick", limits])))
    with (
        pytest.raises(SystemExit) as stopped,
        stage_run("load") as run,
        run.resumable_output("artifacts/made", {"seed": 1}) as made,
    ):
        (made / "half").write_text("hours of work")
        time.sleep(60)
    assert stopped.value.code == 1
    assert read_events(folder)[-1]["payload"]["failure"] == failure
    assert f"raise {limits.partition('=')[0]}" in read_events(folder)[-1]["summary"]
    assert Path("artifacts/.made.partial/half").is_file()


STUCK = """
import time
from quantline.run import watchdog
from quantline.run.stage import stage_run

watchdog.POLL_S = watchdog.GRACE_S = 0.2
with stage_run("load"):
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass
"""


def test_stage_run_ends_by_force_what_does_not_react(folder):
    Path("params.yaml").write_text(as_yaml(compose(["suite=quick", "limits.seconds=0.2"])))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STUCK], env=environment, check=False, timeout=60)
    assert done.returncode == 1
    assert read_events(folder)[-1]["payload"]["failure"] == "timed_out"


# Starts a stage through a shell, and is killed; the stage's own process stays behind.
STARTER = """
import subprocess
import sys

from quantline.run.project_lock import project_lock

with project_lock("quantline repro"):
    subprocess.run(["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", sys.argv[1]])
"""
STARTED = """
import time
from quantline.run import watchdog
from quantline.run.stage import stage_run

watchdog.POLL_S = 0.1
with stage_run("load"):
    print("started", flush=True)
    time.sleep(600)
"""


def test_a_stage_ends_when_the_run_that_started_it_is_killed(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STARTER, STARTED]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        starter.kill()
        starter.stdout.read()  # until the stage has closed it, too
    assert read_events(folder)[-1]["payload"]["failure"] == "interrupted"
    assert f"(process {starter.pid}) was killed" in read_events(folder)[-1]["summary"]


def test_stage_run_prints_a_full_disk_that_takes_no_event_either(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as stopped, stage_run("load") as run:
        monkeypatch.setattr(StageRun, "event", full)
        run.event("info", "x")
    assert stopped.value.code == 1
    assert "disk_full" in capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 77])
def test_stage_run_names_a_full_disk_at_its_very_first_event(folder, capsys, room):
    limit = 1 << 16
    Path("events.jsonl").write_text("." * (limit - room - 1) + "\n")
    with largest_file(limit), pytest.raises(SystemExit) as stopped, stage_run("load"):
        pytest.fail("the stage ran")
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "load: load_rejected (disk_full): OSError: [Errno 27] File too large" in said
    assert "free some space" in said
    assert "Traceback" not in said
