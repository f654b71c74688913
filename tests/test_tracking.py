"""The frame around every stage: events, exit codes, named failures, outputs that appear whole or not at all."""

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
from quantline.files import atomic_folder, sha256_file, sha256_json, versions, write_json
from quantline.run.stage import stage_run

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"id", "ts", "run_id", "parent_run_id", "stage", "severity", "reason_code", "actor", "summary", "payload"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project without a model: conf/, dvc.yaml and params.yaml of the quick suite."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copy(ROOT / "dvc.yaml", root)
    monkeypatch.chdir(root)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (root / "params.yaml").write_text(as_yaml(compose(["suite=quick"])))
    return root


def events(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def fails(error: BaseException, stage: str = "export", instance: str | None = "bf16") -> int:
    """The exit code of a stage whose code raises `error` after it has begun to write."""
    with pytest.raises(SystemExit) as stopped, stage_run(stage, instance) as run, run.output("artifacts/made") as made:
        (made / "half").write_text("written")
        raise error
    return stopped.value.code


def test_a_run_that_ends_well(folder, capsys):
    with stage_run("export", "bf16") as run:
        with run.output("artifacts/exports/bf16") as made:
            (made / "file").write_text("content")
        run.output_file("metrics/bf16.json", {"b": 1, "a": 2.5})
        run.event("warning", "look", payload={"rows": 3})
        run.finish("1 file, 0.1 MiB")
    assert Path("artifacts/exports/bf16/file").read_text() == "content"
    assert json.loads(Path("metrics/bf16.json").read_text()) == {"a": 2.5, "b": 1}
    assert re.fullmatch(r"export bf16: 1 file, 0\.1 MiB, \d+\.\d s\n", capsys.readouterr().out)
    started, looked, finished = events(folder)
    assert [one["severity"] for one in (started, looked, finished)] == ["info", "warning", "info"]
    assert [one["reason_code"] for one in (started, looked, finished)] == ["stage_started", None, "stage_finished"]
    assert looked["payload"] == {"instance": "bf16", "rows": 3}
    for event in (started, looked, finished):
        assert event.keys() == KEYS
        assert re.fullmatch(r"export-[0-9a-f]{12}", event["run_id"]) and event["stage"] == "export"
        assert datetime.fromisoformat(event["ts"]).tzinfo
    assert len({event["id"] for event in (started, looked, finished)}) == 3
    assert started["parent_run_id"].startswith("quantize-") and started["run_id"] == finished["run_id"]


def test_an_export_continues_the_run_of_its_recipe(folder):
    with stage_run("quantize", "q4_k_m") as upstream:
        pass
    with stage_run("export", "gguf-q4_k_m") as run:
        assert run.parent() == upstream.run_id


def test_the_same_parameters_have_the_same_run_id_and_others_another(folder):
    ids = []
    for overrides in (["suite=quick"], ["suite=quick"], ["suite=quick", "seed=1"]):
        Path("params.yaml").write_text(as_yaml(compose(overrides)))
        with stage_run("load") as run:
            ids.append(run.run_id)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("stage, instance, reason", [
    ("load", None, "load_rejected"), ("calibrate", None, "calibration_failed"),
    ("reference", None, "reference_failed"), ("quantize", "none", "export_quantization_failed"),
    ("export", "bf16", "export_run_failed"), ("evaluate", "bf16", "eval_runtime_error"),
    ("compare", None, "compare_failed")])
def test_a_failure_is_named_told_and_leaves_nothing(folder, capsys, stage, instance, reason):
    assert fails(StageError(Failure.NON_FINITE, "expected numbers, found NaN"), stage, instance) == 1
    event = events(folder)[-1]
    assert (event["severity"], event["reason_code"]) == ("error", reason)
    assert event["payload"] == {"failure": "non_finite", "instance": instance}
    assert f"{reason} (non_finite): expected numbers, found NaN" in capsys.readouterr().err
    assert list(Path("artifacts").iterdir()) == []


@pytest.mark.parametrize("error, failure", [
    (MemoryError(), "out_of_memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out_of_memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full"),
    (OSError(errno.EACCES, "Permission denied"), "internal_error"),
    (ZeroDivisionError("division by zero"), "internal_error")])
def test_what_no_stage_foresaw_has_a_name_too(folder, error, failure):
    assert fails(error) == 1
    payload = events(folder)[-1]["payload"]
    assert payload["failure"] == failure and "Traceback" in payload["traceback"]


def test_a_stage_can_give_another_reason(folder):
    fails(StageError(Failure.MISSING_FILE, "no bundle", Reason.EXPORT_ARTIFACT_MISSING), "evaluate")
    assert events(folder)[-1]["reason_code"] == "export_artifact_missing"


def test_an_interrupted_stage_leaves_nothing(folder):
    with pytest.raises(KeyboardInterrupt), stage_run("load") as run, run.output("artifacts/made"):
        raise KeyboardInterrupt
    assert list(Path("artifacts").iterdir()) == []


def test_a_full_disk_that_takes_no_event_either_is_told(folder, capsys, monkeypatch):
    from quantline.run.stage import StageRun

    with pytest.raises(SystemExit) as stopped, stage_run("load") as run:
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(StageRun, "event", full)
        run.event("info", "x")
    assert stopped.value.code == 1 and "disk_full" in capsys.readouterr().err


def test_a_stale_params_stops_every_stage_before_its_code(folder, capsys):
    path = Path("conf/recipe/gptq-w4g128.yaml")
    path.write_text(path.read_text().replace("bits: 4", "bits: 3"))
    with pytest.raises(SystemExit) as stopped, stage_run("load"):
        pytest.fail("the stage ran")
    assert stopped.value.code == 1
    event = events(folder)[-1]
    assert (event["reason_code"], event["payload"]["failure"]) == ("config_invalid", "config_stale")
    told = capsys.readouterr().err
    assert "recipes.gptq-w4g128.bits: 4 -> 3" in told and "quantline compose" in told


def test_the_check_stage_runs_as_dvc_runs_it(folder):
    command = [sys.executable, "-m", "stages.check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    Path("conf/new.yaml").write_text("a: 1\n")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "config_stale" in done.stderr


def test_wrong_parameters_are_config_invalid(folder):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("bits: 4", "bits: 5"))
    with pytest.raises(SystemExit), stage_run("load"):
        pytest.fail("the stage ran")
    event = events(folder)[-1]
    assert (event["reason_code"], event["payload"]["failure"]) == ("config_invalid", "config_invalid")
    assert "recipes.gptq-w4g128.bits" in event["summary"] and event["severity"] == "error"


@pytest.mark.parametrize("stage, instance, told", [
    ("quantize", "gptq-w4g12", "did you mean gptq-w4g128?"), ("export", None, "found none"),
    ("evaluate", "q4_k_m", "gguf-q4_k_m"), ("load", "bf16", "load takes no name")])
def test_a_name_that_params_does_not_have(folder, stage, instance, told):
    with pytest.raises(SystemExit) as stopped, stage_run(stage, instance):
        pytest.fail("the stage ran")
    assert stopped.value.code == 1
    assert events(folder)[-1]["payload"]["failure"] == "config_invalid" and told in events(folder)[-1]["summary"]


@pytest.mark.parametrize("severity, reason", [("error", None), ("critical", None), ("fatal", Reason.LOAD_REJECTED)])
def test_errors_need_a_reason_and_severities_are_a_closed_list(folder, severity, reason):
    assert fails(StageError(Failure.NON_FINITE, "x")) == 1
    before = len(events(folder))
    with stage_run("load") as run, pytest.raises(ValueError, match="severity"):
        run.event(severity, "x", reason)
    assert len(events(folder)) == before + 2  # started and finished


@pytest.mark.parametrize("overrides, offline", [([], "1"), (["model=smollm2-135m"], None), (["evaluation=hub"], None)])
def test_the_hub_is_cut_off_unless_the_parameters_name_it(folder, monkeypatch, overrides, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", "x")  # so that it is put back afterwards
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Path("params.yaml").write_text(as_yaml(compose(overrides)))
    with stage_run("load"):
        assert os.environ.get("HF_HUB_OFFLINE") == offline


def test_nothing_reports_home():
    import stages  # noqa: F401

    assert os.environ["DO_NOT_TRACK"] and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DVC_NO_ANALYTICS"] and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "analytics = false" in (ROOT / ".dvc/config").read_text()


def test_a_stage_imports_nothing_heavy(folder):
    """Evaluating GGUF or ONNX must not pay for torch; no stage pays for MLflow before it logs."""
    code = ("import sys\nfrom quantline.run.stage import stage_run\nwith stage_run('load') as run: pass\n"
            "heavy = {'torch', 'transformers', 'mlflow', 'hydra', 'omegaconf', 'onnx', 'scipy'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "made"
    for name in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
            assert not (target / "new").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_failure_keeps_the_old_folder(tmp_path):
    target = tmp_path / "made"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        raise ZeroDivisionError
    assert (target / "old").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    code = ("import os\nfrom pathlib import Path\nfrom quantline.files import atomic_folder\n"
            "with atomic_folder(Path('made')) as folder:\n    (folder / 'half').write_text('x')\n    os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          check=False)
    assert done.returncode == -9 and not (tmp_path / "made").exists() and list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": {1, 2}}])
def test_json_that_is_none_is_not_written(tmp_path, value):
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


def test_hashes_and_versions(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1})
    found = versions("numpy", "no-such-package")
    assert found["no-such-package"] == "absent" and found["numpy"][0].isdigit()
