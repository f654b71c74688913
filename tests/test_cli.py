"""`quantline compose` and `quantline repro`, with DVC's part played by a stand-in."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantline import cli
from quantline.config.compose import load_params

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {"size_bytes": 2**21, "bits_per_weight": 4.5, "perplexity": 8.125, "mean_kld": 0.0125, "same_top_p": 0.97,
           "gold_accuracy": 0.96}
REPORT = {"target": {"name": "laptop-cpu"}, "pick": "gguf-q4_k_m", "reasons": ["smallest of [two] that pass"], "variants": [
    {"variant": "gguf-q4_k_m", "status": "ok", "failure": None, "pareto": True, "metrics": FIGURES,
     "speed": {"decode_tok_s": 321.4, "peak_rss_mib": 90.0}},
    {"variant": "gptq-w4g128", "status": "failed", "failure": "hessian_not_positive_definite", "pareto": False,
     "metrics": {}, "speed": {}}]}
MEASURED = {"gguf-q4_k_m": (3, 0.02), "bf16": (10, 0.0), "gptq-w4g128": (2, 0.01)}  # MiB, mean KL divergence


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


@pytest.fixture
def measured(folder) -> Path:
    """A project whose variants are measured, but for one that failed."""
    quantline("compose", "suite=quick")
    for name, (size, kld) in MEASURED.items():
        bundle = folder / "artifacts/exports" / name
        bundle.mkdir(parents=True)
        (folder / "metrics/items").mkdir(parents=True, exist_ok=True)
        whose = {"artifact_sha256": "ab", "runtime": "llama.cpp"}
        about = whose | {"variant": name, "substituted_share": 0.0, "versions": {}, "files": {}, "layers": {}, "tensors": {}, "recipe": {},
                 "calibration": None, "created_by": "export-1", "source": {}}
        metrics = FIGURES | {"size_bytes": size * 2**20, "mean_kld": kld, "mean_kld_se": 0.001, "tokens": 1000,
                             **whose, "items_sha256": sha256(b"[]").hexdigest(), "gold_accuracy_delta": 0.0, "gold_lost": 0, "gold_won": 0,
                             "gold_flips": 0, "gold_items": 1000, "gold_p_value": 1.0}
        (bundle / "README.md").write_text("## Serve it\n")
        for path, value in (("manifest.json", about), ("smoke.json", {"prompts": []})):
            (bundle / path).write_text(json.dumps(value))
        (folder / f"metrics/{name}.json").write_text(json.dumps(metrics))
        (folder / f"metrics/{name}.speed.json").write_text(json.dumps(whose | {"decode_tok_s": 9.0, "peak_rss_mib": 200.0}))
        (folder / f"metrics/items/{name}.json").write_text("[]")
    return folder


def test_pick_answers_for_any_target_from_what_is_measured(measured):
    done = quantline("pick")
    assert done.exit_code == 0 and "Ship for laptop-cpu: gguf-q4_k_m" in done.output
    assert "bf16: format safetensors is not among gguf, onnx" in done.output
    done = quantline("pick", "target=gpu-server")
    assert "Ship for gpu-server: gptq-w4g128" in done.output
    assert "bf16: meets the target; size 10.0 MiB, 8.0 MiB (400%) more than the pick" in done.output
    done = quantline("pick", "target=any", "target.max_size_mib=1")
    assert done.exit_code == 0 and "none of them" in done.output
    assert not (measured / "reports").exists() and load_params().target.name == "laptop-cpu"


@pytest.mark.parametrize(("override", "told"), [("target=laptp", "laptop-cpu"), ("suite=quick", "the target alone"),
                                                ("target.max_size=1", "did you mean max_size_mib?")])
def test_pick_refuses_what_is_no_target(measured, override, told):
    done = quantline("pick", override)
    assert done.exit_code == 1 and told in done.output


def test_gate_is_the_exit_code_for_ci(measured):
    done = quantline("gate")
    assert done.exit_code == 0 and "gguf-q4_k_m meets the target laptop-cpu" in done.output
    assert "passes      required  mean_kld is 0.02" in done.output
    done = quantline("gate", "gptq-w4g128")
    assert done.exit_code == 1 and "gptq-w4g128 does not meet the target" in done.output
    assert quantline("gate", "rtn-w4g128").exit_code == 1  # it was not built
    done = quantline("gate", "nought")
    assert done.exit_code == 1 and "expected a variant among bf16" in done.output


def test_gate_fails_with_the_figure_and_counts_what_cannot_be_told_as_asked(measured):
    path = measured / "metrics/gguf-q4_k_m.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean_kld": 0.0999}))
    assert quantline("gate").exit_code == 0
    done = quantline("gate", "gguf-q4_k_m", "--cannot-tell", "fails")
    assert done.exit_code == 1 and "it cannot tell; " in done.output
    assert quantline("gate", "--cannot-tell", "fails").exit_code == 1  # and no other is for a laptop
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean_kld": 0.2}))
    done = quantline("gate", "gguf-q4_k_m")
    assert done.exit_code == 1 and "mean_kld is 0.2, the gate wants <= 0.1" in done.output


def test_gate_refuses_a_stale_configuration(measured):
    target = measured / "conf/target/laptop-cpu.yaml"
    target.write_text(target.read_text().replace("threshold: 0.1", "threshold: 0.001"))
    done = quantline("gate")
    assert done.exit_code == 1 and "stale" in done.output
