"""Runs that MLflow does not take: the stage's work stands, and they are delivered later, once."""

import json
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantline.cli import app
from quantline.config.tracking import Tracking
from quantline.errors import Failure, StageError
from quantline.run.stage import stage_run
from quantline.tracking.undelivered import Run, deliver, keep, kept, log_or_keep
from tests.helpers.tracking import DOWN, local, runs

SECRET = "Tr0ub4dor"
UNDELIVERED = Path(".quantline/undelivered")


def test_track_keeps_what_a_server_that_is_down_does_not_take(down, capsys):
    Path("page.html").write_text("first")
    with stage_run("load") as run:
        assert run.track("a", "a", metrics={"x": 1}, files=[Path("page.html")]) is None
        assert run.track("b", "b", metrics={"x": 2}) is None
    (warning,) = [line for line in down.events() if line["severity"] == "warning"]
    assert warning["reason_code"] == "run_not_tracked"
    assert warning["payload"]["failure"] == Failure.NETWORK_UNAVAILABLE
    assert "Connection refused" in warning["summary"]  # MLflow's own reason
    assert "`quantline track` delivers it" in warning["summary"]
    assert down.events()[-1]["reason_code"] == "stage_finished"
    assert "does not have what load made" in capsys.readouterr().err
    assert [run.key for _, run in kept()] == ["a", "b"]

    Path("page.html").write_text("a later one")
    down.compose()  # the local store
    with stage_run("load") as run:
        assert run.track("c", "c", metrics={"x": 3})
    logged = {run.data.tags["quantline.key"]: run for run in runs(down.root)}
    assert {key: run.data.metrics["x"] for key, run in logged.items()} == {"a": 1, "b": 2, "c": 3}
    assert {run.info.status for run in logged.values()} == {"FINISHED"}
    assert logged["a"].info.start_time < logged["c"].info.start_time
    (page,) = (down.root / "mlartifacts").rglob("page.html")
    assert page.read_text() == "first"  # as it was when the stage ended
    assert list(kept()) == []


def test_deliver_twice_is_there_once(down):
    run = Run("a", "a", params={"p": 1}, metrics={"x": 1.5}, tags={"t": "v"}, started=time.time())
    for _ in range(2):
        keep(run)
    assert len(list(UNDELIVERED.iterdir())) == 1
    shutil.copytree(UNDELIVERED, "again")
    assert [one.key for one in deliver(local(down.root)).delivered] == ["a"]
    shutil.copytree("again", UNDELIVERED, dirs_exist_ok=True)  # killed before it was taken away
    deliver(local(down.root))
    (logged,) = runs(down.root)
    assert logged.data.metrics == {"x": 1.5}
    with sqlite3.connect(down.root / "mlflow.db") as database:
        assert database.execute("select count(*) from metrics").fetchone() == (1,)


def test_keep_keeps_no_secrets_and_kept_skips_what_is_none_of_ours(down, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    keep(Run("a", "a", params={"uri": f"https://a:{SECRET}x@b.org"}, tags={"m": f"{SECRET}"}))
    texts = [path.read_text() for path in UNDELIVERED.rglob("*") if path.is_file()]
    assert texts and SECRET not in "".join(texts)
    for name, text in (("1-torn", '{"key": "x'), ("2-foreign", "[1]"), ("3-empty", "")):
        (UNDELIVERED / name).mkdir()
        (UNDELIVERED / name / "run.json").write_text(text)
    assert [run.key for _, run in kept()] == ["a"]


def test_track_does_not_fail_a_stage_whose_run_cannot_even_be_kept(down, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantline.tracking.undelivered.keep", full)
    with stage_run("load") as run:
        assert run.track("a", "a") is None
    warning = down.events()[-2]
    assert warning["severity"] == "warning" and "cannot be kept" in warning["summary"]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_log_or_keep_waits_seconds_for_a_server_that_hangs(down, silent_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracking = Tracking(uri=silent_server, experiment="x")
    started = time.monotonic()
    for key in ("a", "b", "c"):  # it is asked once
        outcome = log_or_keep(tracking, Run(key, key))
        assert outcome.error.failure is Failure.NETWORK_UNAVAILABLE
    assert time.monotonic() - started < 8
    assert "imed out" in str(outcome.error)


def test_a_failed_stage_is_a_failed_run_without_secrets(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for _ in range(2):
        with pytest.raises(SystemExit), stage_run("export", "bf16"):
            raise StageError(Failure.NON_FINITE, f"found NaN at https://a:b@c.org/?token={SECRET}")
    (failed,) = runs(project.root)
    assert failed.info.status == "FAILED"
    tags = failed.data.tags
    assert (tags["failure"], tags["instance"]) == ("non_finite", "bf16")
    assert (tags["stage"], tags["reason_code"]) == ("export", "export_run_failed")
    assert tags["message"] == "found NaN at https://c.org/?token=***"
    assert SECRET.encode() not in (project.root / "mlflow.db").read_bytes()


def test_a_failed_stage_makes_no_database_and_its_run_comes_later(project, empty_database):
    (project.root / "mlflow.db").unlink()
    with pytest.raises(SystemExit), stage_run("export", "bf16"):
        raise StageError(Failure.NON_FINITE, "found NaN")
    assert not (project.root / "mlflow.db").exists()
    shutil.copy(empty_database, project.root / "mlflow.db")
    with stage_run("load") as run:
        run.track("a", "a")
    assert {run.info.status for run in runs(project.root)} == {"FAILED", "FINISHED"}


def test_quantline_track_delivers_all_and_registers(down, monkeypatch):
    ran = []
    monkeypatch.setattr("quantline.cli.track.run_module", lambda name: ran.append(name) or 0)
    answer = CliRunner().invoke(app, ["track"])
    assert (answer.exit_code, answer.output) == (0, "no run waits for MLflow\n")
    with stage_run("load") as run:
        run.track("a", "a")
    answer = CliRunner().invoke(app, ["track"])
    assert answer.exit_code == 1 and "network_unavailable" in answer.output
    keep(Run("b", "compare", tags={"stage": "compare"}))
    down.compose()
    answer = CliRunner().invoke(app, ["track"])
    assert (answer.exit_code, answer.output) == (0, "2 of 2 runs delivered\n")
    assert ran == ["stages.compare"]
    assert len(runs(down.root)) == 2


def test_promote_waits_for_mlflow(down):
    from tests.helpers.report import DECIDED, write_measured

    choice = ["suite=default", "variant=[gguf-q8_0]", "recipe=[q8_0]"]
    down.compose(*DOWN, *choice, "tracking.registry.promote=auto")
    write_measured("gguf-q8_0", 5, 0.001, **DECIDED)
    down.stage("compare")
    line = [line for line in down.events() if line["reason_code"] == "model_not_registered"][-1]
    assert "`quantline track` delivers the runs, and promotes the pick" in line["summary"]
    assert json.loads(Path("reports/compression.json").read_text())["pick"] == "gguf-q8_0"
    assert {run.tags["stage"] for _, run in kept()} == {"compare", "evaluate"}
