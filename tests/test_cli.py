"""`quantline compose` and `quantline repro`, with DVC's part played by a stand-in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stages import cli
from stages.config import load_params

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {"size_bytes": 2**21, "bits_per_weight": 4.5, "perplexity": 8.125, "mean_kld": 0.0125, "same_top_p": 0.97,
           "gold_accuracy": 0.96}
REPORT = {"target": {"name": "laptop-cpu"}, "pick": "gguf-q4_k_m", "reasons": ["smallest of [two] that pass"], "variants": [
    {"variant": "gguf-q4_k_m", "status": "ok", "failure": None, "pareto": True, "metrics": FIGURES,
     "speed": {"decode_tok_s": 321.4, "peak_rss_mib": 90.0}},
    {"variant": "gptq-w4g128", "status": "failed", "failure": "hessian_not_positive_definite", "pareto": False,
     "metrics": {}, "speed": {}}]}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project whose inputs are there, empty."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "demo/model").mkdir(parents=True)
    (tmp_path / "demo/data").mkdir()
    for name in ("calibration.txt", "evaluation.txt", "gold.jsonl"):
        (tmp_path / "demo/data" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quantline(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "120"})


def played(monkeypatch, codes: dict[str, int], writes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Plays `_run`: modules end with the given codes, and those in `writes` write the report. Returns the calls."""
    calls = []

    def run(module: str, *arguments: str) -> int:
        calls.append((module, *arguments))
        if module in writes:
            Path("reports").mkdir(exist_ok=True)
            Path("reports/compression.json").write_text(json.dumps(REPORT))
        return codes.get(module, 0)

    monkeypatch.setattr(cli, "_run", run)
    return calls


def test_compose_writes_params_and_says_what_changes(folder):
    done = quantline("compose", "suite=quick")
    assert done.exit_code == 0 and load_params().suite == "quick"
    done = quantline("compose", "suite=quick", "recipes.gptq-w4g128.bits=3")
    assert "recipes.gptq-w4g128.bits: 4 -> 3" in done.output
    before = Path("params.yaml").stat().st_mtime_ns
    assert "as before" in quantline("compose", "suite=quick", "recipes.gptq-w4g128.bits=3").output
    assert Path("params.yaml").stat().st_mtime_ns == before


def test_compose_works_from_a_folder_inside(folder, monkeypatch):
    monkeypatch.chdir(folder / "conf/suite")
    assert quantline("compose").exit_code == 0
    assert (folder / "params.yaml").is_file() and not (folder / "conf/suite/params.yaml").exists()


@pytest.mark.parametrize("override, told", [
    ("model.pth=x", "did you mean path?"), ("suite=quik", "quick"), ("model=local", "model.path=..."),
    ("evaluation.path=nowhere.txt", "evaluation.path: there is no nowhere.txt")])
@pytest.mark.parametrize("command", ["compose", "repro"])
def test_a_wrong_override_is_told_and_changes_nothing(folder, monkeypatch, command, override, told):
    quantline("compose", "suite=quick")
    before, calls = Path("params.yaml").read_bytes(), played(monkeypatch, {}, ())
    arguments = [override, "model.path=x"] if override == "model.pth=x" else [override]
    done = quantline(command, *arguments)
    assert done.exit_code == 1 and told in done.output and "config_invalid" in done.output
    assert Path("params.yaml").read_bytes() == before and not calls


def test_outside_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = quantline("compose")
    assert done.exit_code == 1 and "expected dvc.yaml and conf/" in done.output


def test_repro_shows_the_table_the_pick_and_the_page(folder, monkeypatch):
    calls = played(monkeypatch, {}, ("dvc",))
    done = quantline("repro", "suite=quick")
    assert done.exit_code == 0 and calls == [("dvc", "repro", "--keep-going")] and load_params().suite == "quick"
    line = next(line for line in done.output.splitlines() if line.startswith("gguf-q4_k_m"))
    assert line.split() == ["gguf-q4_k_m", "2.0", "4.50", "8.125", "0.01250", "97.0", "96.0", "321", "90", "pick"]
    assert "failed: hessian_not_positive_definite" in done.output
    assert "Ship for laptop-cpu: gguf-q4_k_m" in done.output and "- smallest of [two] that pass" in done.output
    assert "reports/compression.html" in done.output


def test_after_a_failure_the_page_is_made_all_the_same(folder, monkeypatch):
    calls = played(monkeypatch, {"dvc": 1}, ("stages.compare",))
    done = quantline("repro", "suite=quick")
    assert done.exit_code == 1 and calls == [("dvc", "repro", "--keep-going"), ("stages.compare",)]
    assert "Ship for laptop-cpu" in done.output and "something failed" in done.output


def test_an_older_page_is_not_shown_as_this_runs(folder, monkeypatch):
    played(monkeypatch, {}, ("dvc",))
    assert quantline("repro", "suite=quick").exit_code == 0
    played(monkeypatch, {"dvc": 1, "stages.compare": 1}, ())
    done = quantline("repro", "suite=quick")
    assert done.exit_code == 1 and "no comparison could be made" in done.output and "Ship for" not in done.output


def test_stages_run_with_this_python_also_where_no_environment_is_active(folder, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    seen = {}
    monkeypatch.setattr(subprocess, "run", lambda command, env, check: seen.update(command=command, env=env) or
                        subprocess.CompletedProcess(command, 3))
    assert cli._run("dvc", "repro") == 3
    assert seen["command"] == [sys.executable, "-m", "dvc", "repro"]
    assert seen["env"]["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
