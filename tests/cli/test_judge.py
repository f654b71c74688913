"""`quantline pick` and `quantline gate`: answers from what is measured; nothing is run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantline.config.compose import load_params
from quantline.files import as_json, sha256_file, write_json, write_text
from quantline.paths import EXPORTS, METRICS
from tests.helpers.command_line import quantline
from tests.helpers.lineage import vouch_for
from tests.helpers.project import ROOT, Conf, composed
from tests.helpers.report import MEASURED_FIGURES

# Variant → its size in MiB, and its mean KL divergence.
MEASURED = {"gguf-q4_k_m": (3, 0.02), "bf16": (10, 0.0), "gptq-w4g128": (2, 0.01)}
GOLD = {
    "gold_accuracy_delta": 0.0,
    "gold_lost": 0,
    "gold_won": 0,
    "gold_flips": 0,
    "gold_items": 1000,
    "gold_p_value": 1.0,
}


def write_variant(name: str, size: float, kld: float) -> None:
    """Write a bundle of `size` MiB and its figures."""
    answers = METRICS / "items" / f"{name}.json"
    write_text(answers, "[]")
    measured_on = {"artifact_sha256": "ab", "runtime": "llama.cpp"}
    manifest: dict[str, Any] = {
        "variant": name,
        "substituted_share": 0.0,
        "versions": {},
        "files": {},
        "layers": {},
        "tensors": {},
        "recipe": {},
        "calibration": None,
        "created_by": "export-1",
        "source": {},
    }
    metrics = {
        "size_bytes": size * 2**20,
        "mean_kld": kld,
        "mean_kld_se": 0.001,
        "tokens": 1000,
        "items_sha256": sha256_file(answers),
    }
    speed = {"decode_tok_s": 9.0, "peak_rss_mib": 200.0}
    write_text(EXPORTS / name / "README.md", "## Serve it\n")
    write_json(EXPORTS / name / "manifest.json", measured_on | manifest)
    write_json(EXPORTS / name / "smoke.json", {"prompts": []})
    write_json(METRICS / f"{name}.json", MEASURED_FIGURES | GOLD | metrics | measured_on)
    write_json(METRICS / f"{name}.speed.json", measured_on | speed)
    vouch_for(name, load_params())


@pytest.fixture
def measured(folder) -> Path:
    """A project whose variants are measured, but for one that failed."""
    (folder / "params.yaml").write_text(composed(Conf(folder), ("suite=quick",)))
    for name, (size, kld) in MEASURED.items():
        write_variant(name, size, kld)
    return folder


HOLD = """
import sys
from quantline.run.project_lock import project_lock
with project_lock("quantline repro"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_while_a_run_is_at_work_nothing_changes_and_questions_are_answered(measured):
    """A second terminal, in a process of its own."""
    answers = {command: quantline(command).output for command in ("pick", "gate")}
    before = {path: path.read_bytes() for path in measured.rglob("*.*") if path.is_file()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for command in (["compose"], ["repro"], ["init", "suite=full"], ["grid", "gptq"]):
            done = quantline(*command)
            assert done.exit_code == 1
            assert f"`quantline repro` (process {holder.pid}, since 20" in done.output
        assert {command: quantline(command).output for command in answers} == answers
        # What the run replaces meanwhile is no answer.
        name = next(iter(MEASURED))
        write_json(METRICS / f"{name}.json", {"mean_kld": 0.0, "artifact_sha256": "cd"})
        assert quantline("gate", name).exit_code == 1
        (METRICS / f"{name}.json").write_bytes(before[measured / METRICS / f"{name}.json"])
        holder.communicate("\n")
    after = {path: path.read_bytes() for path in before if path.name != "holder.json"}
    assert after == {path: before[path] for path in after}


def test_pick_changes_the_target_of_the_project_and_not_that_of_conf(measured):
    quantline("compose", "suite=quick", "target=any", "target.optimize.metric=mean_kld")
    done = quantline("pick", "target.optimize.within=0.0", "+target.max_size_mib=4")
    assert "Ship for any: gptq-w4g128" in done.output
    assert "Ship for any: bf16" in quantline("pick", "target.optimize.within=0.0").output
    assert "Ship for gpu-server: " in quantline("pick", "target=gpu-server").output


@pytest.mark.parametrize("key", ["mean_kld_se", "size_bytes", "gold_flips"])
@pytest.mark.parametrize("value", [None, "x"])
def test_figures_without_one_that_decides_are_named(measured, key, value):
    name = next(iter(MEASURED))
    path = METRICS / f"{name}.json"
    path.write_text(as_json(json.loads(path.read_text()) | {key: value}))
    vouch_for(name, load_params())
    done = quantline("gate", name)
    assert done.exit_code == 1
    assert "as their stages wrote them" in done.output
    assert key in done.output


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("target.optimize.metric=siz_bytes", "did you mean size_bytes?"),
        ("target.gates=[{metric: mean_kdl, operator: '<=', threshold: 1}]", "mean_kld?"),
        ("target.gates=[{metric: gold_x, operator: '>=', threshold: 1}]", None),
    ],
)
def test_a_figure_that_nobody_knows_is_refused_when_it_is_named(measured, override, words):
    for command in ("compose", "pick"):
        done = quantline(command, *["suite=quick"] * (command == "compose"), override)
        assert (words is None) == ("unknown figure" not in done.output)
        assert words is None or (words in done.output and done.exit_code == 1)
    Path("demo/data/gold.jsonl").write_text('{"id": "a", "task": "facts"}\n')
    done = quantline("compose", "target.gates=[{metric: gold_fact, operator: '>', threshold: 0}]")
    assert "did you mean gold_facts?" in done.output


def change_divergence(variant: str, kld: float) -> None:
    path = METRICS / f"{variant}.json"
    path.write_text(as_json(json.loads(path.read_text()) | {"mean_kld": kld}))
    vouch_for(variant, load_params())


def test_pick_answers_for_any_target_from_what_is_measured(measured):
    done = quantline("pick")
    assert done.exit_code == 0
    assert "Ship for laptop-cpu: gguf-q4_k_m" in done.output
    assert "bf16: format safetensors is not among gguf, onnx" in done.output
    done = quantline("pick", "target=gpu-server")
    assert "Ship for gpu-server: gptq-w4g128" in done.output
    expected = "bf16: meets the target; size 10.0 MiB, 8.0 MiB (400%) more than the pick"
    assert expected in done.output
    done = quantline("pick", "target=any", "target.max_size_mib=1")
    assert done.exit_code == 0
    assert "none of them" in done.output
    assert not (measured / "reports").exists()
    assert load_params().target.name == "laptop-cpu"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("target=laptp", "laptop-cpu"),
        ("suite=quick", "the target alone"),
        ("target.max_size=1", "did you mean max_size_mib?"),
    ],
)
def test_pick_refuses_what_is_no_target(measured, override, words):
    done = quantline("pick", override)
    assert done.exit_code == 1
    assert words in done.output


def test_gate_is_the_exit_code_for_ci(measured):
    done = quantline("gate")
    assert done.exit_code == 0
    assert "gguf-q4_k_m meets the target laptop-cpu" in done.output
    assert "passes      required  mean_kld is 0.02" in done.output
    done = quantline("gate", "gptq-w4g128")
    assert done.exit_code == 1
    assert "gptq-w4g128 does not meet the target" in done.output
    assert quantline("gate", "rtn-w4g128").exit_code == 1  # it was not built
    done = quantline("gate", "nought")
    assert done.exit_code == 1
    assert "expected a variant among bf16" in done.output


def test_gate_counts_what_it_cannot_tell_as_requested(measured):
    change_divergence("gguf-q4_k_m", 0.0999)
    assert quantline("gate").exit_code == 0
    done = quantline("gate", "gguf-q4_k_m", "--cannot-tell", "fails")
    assert done.exit_code == 1
    assert "it cannot tell; " in done.output
    # No other variant is for a laptop.
    assert quantline("gate", "--cannot-tell", "fails").exit_code == 1
    change_divergence("gguf-q4_k_m", 0.2)
    done = quantline("gate", "gguf-q4_k_m")
    assert done.exit_code == 1
    assert "mean_kld is 0.2, the gate wants <= 0.1" in done.output


def test_gate_refuses_a_stale_configuration(measured):
    target = measured / "conf/target/laptop-cpu.yaml"
    text = target.read_text()
    assert "threshold: 0.1" in text
    target.write_text(text.replace("threshold: 0.1", "threshold: 0.001"))
    done = quantline("gate")
    assert done.exit_code == 1
    assert "stale" in done.output
