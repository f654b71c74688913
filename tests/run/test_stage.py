"""The frame around every stage: events, exit codes, named failures, and the Hub cut off."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from quantline.config.compose import as_yaml, compose
from quantline.errors import Failure, Reason, StageError
from quantline.run.stage import stage_run
from tests.helpers.project import ROOT, read_events

KEYS = {
    "id",
    "ts",
    "run_id",
    "parent_run_id",
    "stage",
    "severity",
    "reason_code",
    "actor",
    "summary",
    "payload",
}
# What no stage may pay for before it needs it.
HEAVY = ("torch", "transformers", "mlflow", "hydra", "omegaconf", "onnx", "numba", "scipy")


def run_code(code: str) -> None:
    """Run code in a process of its own, which has to end well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def exit_code_after(
    error: BaseException, stage: str = "export", instance: str | None = "bf16"
) -> int:
    """Return the exit code of a stage whose code raises `error` after it has begun to write."""
    with (
        pytest.raises(SystemExit) as stopped,
        stage_run(stage, instance) as run,
        run.output("artifacts/made") as made,
    ):
        (made / "half").write_text("written")
        raise error
    return stopped.value.code


def test_stage_run_writes_events_output_and_summary(folder, capsys):
    with stage_run("export", "bf16") as run:
        with run.output("artifacts/exports/bf16") as made:
            (made / "file").write_text("content")
        run.event("warning", "look", payload={"rows": 3})
        run.set_summary("1 file, 0.1 MiB")
    assert Path("artifacts/exports/bf16/file").read_text() == "content"
    printed = capsys.readouterr().out
    assert re.fullmatch(
        r"export bf16: 1 file, 0\.1 MiB, \d+\.\d s, peak memory [\d,]+ MiB\n", printed
    )
    written = read_events(folder)
    started, looked, finished = written
    assert [event["severity"] for event in written] == ["info", "warning", "info"]
    reasons = [event["reason_code"] for event in written]
    assert reasons == ["stage_started", None, "stage_finished"]
    assert looked["payload"] == {"instance": "bf16", "rows": 3}
    assert finished["payload"]["seconds"] >= 0
    assert finished["payload"]["peak_mib"] > 10
    for event in written:
        assert event.keys() == KEYS
        assert event["stage"] == "export"
        assert re.fullmatch(r"export-[0-9a-f]{12}", event["run_id"])
        assert datetime.fromisoformat(event["ts"]).tzinfo
    assert len({event["id"] for event in written}) == 3
    assert started["parent_run_id"].startswith("quantize-")
    assert started["run_id"] == finished["run_id"]


def test_stage_run_of_an_export_continues_the_run_of_its_recipe(folder):
    with stage_run("quantize", "q4_k_m") as upstream:
        pass
    with stage_run("export", "gguf-q4_k_m"):
        pass
    assert read_events(folder)[-1]["parent_run_id"] == upstream.run_id


def test_run_id_is_the_same_for_the_same_parameters_alone(folder):
    ids = []
    for overrides in (["suite=quick"], ["suite=quick"], ["suite=quick", "seed=1"]):
        Path("params.yaml").write_text(as_yaml(compose(overrides)))
        with stage_run("load") as run:
            ids.append(run.run_id)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("stage", "instance", "reason"),
    [
        ("load", None, "load_rejected"),
        ("calibrate", None, "calibration_failed"),
        ("reference", None, "reference_failed"),
        ("quantize", "none", "export_quantization_failed"),
        ("export", "bf16", "export_run_failed"),
        ("evaluate", "bf16", "eval_runtime_error"),
        ("compare", None, "compare_failed"),
    ],
)
def test_stage_run_names_a_failure_and_leaves_nothing(folder, capsys, stage, instance, reason):
    error = StageError(Failure.NON_FINITE, "expected numbers, found NaN")
    assert exit_code_after(error, stage, instance) == 1
    event = read_events(folder)[-1]
    assert (event["severity"], event["reason_code"]) == ("error", reason)
    assert event["payload"] == {"failure": "non_finite", "instance": instance}
    assert f"{reason} (non_finite): expected numbers, found NaN" in capsys.readouterr().err
    assert list(Path("artifacts").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (MemoryError(), "out_of_memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            "out_of_memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (OSError(errno.EACCES, "Permission denied"), "permission_denied"),
        (ZeroDivisionError("division by zero"), "internal_error"),
    ],
)
def test_stage_run_names_what_no_stage_foresaw(folder, error, failure):
    assert exit_code_after(error) == 1
    payload = read_events(folder)[-1]["payload"]
    assert payload["failure"] == failure
    assert "Traceback" in payload["traceback"]


def test_stage_run_takes_the_reason_of_an_error(folder):
    error = StageError(Failure.MISSING_FILE, "no bundle", Reason.EXPORT_ARTIFACT_MISSING)
    exit_code_after(error, "evaluate")
    assert read_events(folder)[-1]["reason_code"] == "export_artifact_missing"


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (SystemExit(0), "internal_error"),
        (type("PanicException", (BaseException,), {})("no such token"), "runtime_crashed"),
    ],
)
def test_stage_run_names_what_is_no_exception(folder, error, failure):
    assert exit_code_after(error) == 1
    assert read_events(folder)[-1]["payload"]["failure"] == failure


def test_stage_run_stops_at_stale_parameters_before_any_code(folder, capsys):
    path = Path("conf/recipe/_gptq.yaml")
    text = path.read_text()
    assert "bits: 4" in text
    path.write_text(text.replace("bits: 4", "bits: 3"))
    with pytest.raises(SystemExit) as stopped, stage_run("load"):
        pytest.fail("the stage ran")
    assert stopped.value.code == 1
    event = read_events(folder)[-1]
    assert event["reason_code"] == "config_invalid"
    assert event["payload"]["failure"] == "config_stale"
    message = capsys.readouterr().err
    assert "recipes.gptq-w4g128.bits: 4 -> 3" in message
    assert "quantline compose" in message


def test_check_as_a_command_refuses_stale_parameters(folder):
    Path("conf/new.yaml").write_text("a: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "stages.check"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "config_stale" in done.stderr


def test_stage_run_names_wrong_parameters(folder):
    text = Path("params.yaml").read_text()
    assert "bits: 4" in text
    Path("params.yaml").write_text(text.replace("bits: 4", "bits: 5"))
    with pytest.raises(SystemExit), stage_run("load"):
        pytest.fail("the stage ran")
    event = read_events(folder)[-1]
    assert event["severity"] == "error"
    assert event["reason_code"] == "config_invalid"
    assert event["payload"]["failure"] == "config_invalid"
    assert "recipes.gptq-w4g128.bits" in event["summary"]


@pytest.mark.parametrize(
    ("stage", "instance", "words"),
    [
        ("quantize", "gptq-w4g12", "did you mean gptq-w4g128?"),
        ("export", None, "found none"),
        ("evaluate", "q4_k_m", "gguf-q4_k_m"),
        ("load", "bf16", "load takes no name"),
    ],
)
def test_stage_run_refuses_a_name_that_params_does_not_have(folder, stage, instance, words):
    with pytest.raises(SystemExit) as stopped, stage_run(stage, instance):
        pytest.fail("the stage ran")
    assert stopped.value.code == 1
    event = read_events(folder)[-1]
    assert event["payload"]["failure"] == "config_invalid"
    assert words in event["summary"]


@pytest.mark.parametrize(
    ("severity", "reason"),
    [("error", None), ("critical", None), ("fatal", Reason.LOAD_REJECTED)],
)
def test_event_wants_a_known_severity_and_a_reason_for_errors(folder, severity, reason):
    assert exit_code_after(StageError(Failure.NON_FINITE, "x")) == 1
    before = len(read_events(folder))
    with stage_run("load") as run, pytest.raises(ValueError, match="severity"):
        run.event(severity, "x", reason)
    assert len(read_events(folder)) == before + 2  # started and finished


@pytest.mark.parametrize(
    ("overrides", "offline"),
    [([], "1"), (["model=smollm2-135m"], None), (["evaluation=hub"], None)],
)
def test_stage_run_cuts_off_the_hub_unless_the_parameters_name_it(
    folder, monkeypatch, overrides, offline
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "x")  # so that it is put back afterwards
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Path("params.yaml").write_text(as_yaml(compose(overrides)))
    with stage_run("load"):
        assert os.environ.get("HF_HUB_OFFLINE") == offline


def test_resumable_output_says_that_it_continues_or_starts_over(folder, capsys):
    partial = Path("artifacts/.made.partial")
    partial.mkdir(parents=True)
    key_file = Path("artifacts/.made.partial.json")

    def note() -> None:
        content = {"key": {"seed": 1}, "inode": partial.stat().st_ino}
        key_file.write_text(json.dumps(content))

    note()
    with stage_run("load") as run:
        with run.resumable_output("artifacts/made", {"seed": 1}) as made:
            shutil.copytree(made, "copy")
        shutil.copytree("copy", partial)
        note()
        with run.resumable_output("artifacts/made", {"seed": 2}):
            pass
    sentences = [
        "load: resumes where a killed run stopped",
        "load: starts over, because seed changed since a run was killed",
    ]
    assert capsys.readouterr().out.splitlines()[:2] == sentences
    summaries = [event["summary"] for event in read_events(folder)]
    assert summaries[1:3] == [sentence.replace(":", "", 1) for sentence in sentences]


def test_import_quantline_keeps_everything_from_reporting_home():
    run_code(
        "import os\n"
        "for name in list(os.environ):\n"
        "    if name in ('DO_NOT_TRACK', 'MLFLOW_DISABLE_TELEMETRY', 'OMP_WAIT_POLICY'):\n"
        "        del os.environ[name]\n"
        "import quantline\n"
        "assert os.environ['DO_NOT_TRACK'] == 'true'\n"
        "assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'true'\n"
        "assert os.environ['DVC_NO_ANALYTICS'] == 'true'\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
    )
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()


def test_stage_run_imports_nothing_heavy(folder):
    """No stage pays for MLflow before it logs, or for torch before it computes."""
    run_code(
        "import sys\n"
        "from quantline.run.stage import stage_run\n"
        "with stage_run('load') as run:\n"
        "    pass\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
