"""The commands of quantline, with DVC's part played by a stand-in."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from quantline.cli import dvc, program, repro
from quantline.config.compose import compose, load_params
from quantline.files import write_json, write_text
from quantline.run.leash import is_running
from tests.helpers.command_line import quantline, write_empty_project
from tests.helpers.project import ROOT

FIGURES = {
    "size_bytes": 2**21,
    "bits_per_weight": 4.5,
    "perplexity": 8.125,
    "mean_kld": 0.0125,
    "same_top_p": 0.97,
    "gold_accuracy": 0.96,
}
REPORT = {
    "target": {"name": "laptop-cpu"},
    "pick": "gguf-q4_k_m",
    "reasons": ["smallest of [two] that pass"],
    "variants": [
        {
            "variant": "gguf-q4_k_m",
            "status": "ok",
            "failure": None,
            "pareto": True,
            "metrics": FIGURES,
            "speed": {"decode_tok_s": 321.4, "peak_rss_mib": 90.0},
        },
        {
            "variant": "gptq-w4g128",
            "status": "failed",
            "failure": "hessian_not_positive_definite",
            "message": "expected a Hessian that can be inverted",
            "pareto": False,
            "metrics": {},
            "speed": {},
        },
    ],
}
DVC = "quantline.run.dvc_program"
DVC_REPRO = (DVC, ".quantline/refusals.json", "repro", "--keep-going")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project whose inputs are there, empty."""
    write_empty_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(monkeypatch, codes: dict[str, int], writers: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Stand in for `_run`.

    Args:
        monkeypatch: Pytest's.
        codes: Module → the code that it ends with; all others end well.
        writers: The modules that write the report.

    Returns:
        The calls.
    """
    calls = []

    def run(module: str, *arguments: str) -> int:
        calls.append((module, *arguments))
        if module in writers:
            write_json(Path("reports/compression.json"), REPORT)
        return codes.get(module, 0)

    monkeypatch.setattr(repro, "run_module", run)
    monkeypatch.setattr(dvc, "run_module", run)
    monkeypatch.setattr(repro, "_is_present", lambda: True)
    return calls


def test_compose_writes_params_and_says_what_changes(folder):
    done = quantline("compose", "suite=quick")
    assert done.exit_code == 0
    assert load_params().suite == "quick"
    done = quantline("compose", "suite=quick", "recipes.gptq-w4g128.bits=3")
    assert "recipes.gptq-w4g128.bits: 4 -> 3" in done.output
    before = Path("params.yaml").stat().st_mtime_ns
    done = quantline("compose", "suite=quick", "recipes.gptq-w4g128.bits=3")
    assert "as before" in done.output
    assert Path("params.yaml").stat().st_mtime_ns == before


def test_compose_works_from_a_folder_inside_the_project(folder, monkeypatch):
    monkeypatch.chdir(folder / "conf/suite")
    assert quantline("compose").exit_code == 0
    assert (folder / "params.yaml").is_file()
    assert not (folder / "conf/suite/params.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.pth=x", "model.path=x"], "did you mean path?"),
        (["suite=quik"], "quick"),
        (["model=local"], "model.path=..."),
        (["evaluation.path=nowhere.txt"], "evaluation.path: there is no nowhere.txt"),
    ],
)
@pytest.mark.parametrize("command", ["compose", "repro"])
def test_a_wrong_override_changes_nothing(folder, monkeypatch, command, overrides, words):
    quantline("compose", "suite=quick")
    before = Path("params.yaml").read_bytes()
    calls = stand_in(monkeypatch, {}, ())
    done = quantline(command, *overrides)
    assert done.exit_code == 1
    assert words in done.output
    assert "config_invalid" in done.output
    assert Path("params.yaml").read_bytes() == before
    assert not calls


@pytest.mark.parametrize("content", [None, b"", b"- a\n", b"a: [", b"\xff\xfe\0", b"foreign: 1\n"])
def test_compose_writes_a_params_yaml_that_cannot_be_read_anew(folder, content):
    if content is not None:
        Path("params.yaml").write_bytes(content)
        for command in ("gate", "pick", "verify"):
            done = quantline(command)
            assert done.exit_code == 1
            assert "config_invalid" in done.output
    done = quantline("compose", "suite=quick")
    assert done.exit_code == 0
    assert "params.yaml: new" in done.output
    assert load_params().suite == "quick"


def test_compose_needs_no_home(folder, monkeypatch):
    monkeypatch.delenv("HOME")
    assert quantline("compose", "suite=quick").exit_code == 0


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_named_and_changes_nothing(folder, monkeypatch, number):
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), ".quantline")

    monkeypatch.setattr(Path, "mkdir", refuse)
    for command in ("compose", "repro", "init", "grid"):
        done = quantline(command, *["gptq"] * (command == "grid"))
        assert done.exit_code == 1
        assert "permission_denied" in done.output
        assert ".quantline" in done.output
    assert not (folder / "params.yaml").exists()


def test_compose_outside_a_project_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = quantline("compose")
    assert done.exit_code == 1
    assert "expected dvc.yaml and conf/" in done.output


def test_repro_shows_the_table_the_pick_and_the_page(folder, monkeypatch):
    calls = stand_in(monkeypatch, {}, (DVC,))
    done = quantline("repro", "suite=quick")
    assert done.exit_code == 1  # one variant has no figures
    assert "gptq-w4g128: expected a Hessian that can be inverted" in done.output
    assert calls == [DVC_REPRO]
    assert load_params().suite == "quick"
    line = next(line for line in done.output.splitlines() if line.startswith("gguf-q4_k_m"))
    figures = ["2.0", "4.50", "8.125", "0.01250", "97.0", "96.0", "321", "90"]
    assert line.split() == ["gguf-q4_k_m", *figures, "pick"]
    assert "failed: hessian_not_positive_definite" in done.output
    assert "Ship for laptop-cpu: gguf-q4_k_m" in done.output
    assert "- smallest of [two] that pass" in done.output
    assert "reports/compression.html" in done.output


def test_repro_makes_the_page_after_a_failure_too(folder, monkeypatch):
    calls = stand_in(monkeypatch, {DVC: 1}, ("stages.compare",))
    done = quantline("repro", "suite=quick")
    assert done.exit_code == 1
    refused = f"DVC did not run the pipeline: it ended with exit code 1; {dvc.ADVICE}"
    assert calls == [DVC_REPRO, ("stages.compare", refused)]
    assert "Ship for laptop-cpu" in done.output
    assert "something failed" in done.output


def test_what_dvc_refuses_is_an_event_and_stands_on_the_page(folder, monkeypatch):
    calls: list[tuple[str, ...]] = []

    def run(module: str, *arguments: str) -> int:
        calls.append((module, *arguments))
        if module == DVC:
            write_text(Path(arguments[0]), json.dumps([["load", "no data"], [None, "no lock"]]))
        return int(module == DVC)

    monkeypatch.setattr(repro, "run_module", run)
    monkeypatch.setattr(dvc, "run_module", run)
    assert quantline("repro", "suite=quick").exit_code == 1
    events = [json.loads(line) for line in Path("events.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events] == ["load", "repro"]
    assert {event["payload"]["failure"] for event in events} == {"pipeline_refused"}
    assert "no data" in events[0]["summary"]
    assert calls[1] == ("stages.compare", *(event["summary"] for event in events))


def test_repro_changes_nothing_in_a_project_without_dvcs_folder(folder, monkeypatch):
    shutil.rmtree(folder / ".dvc")
    calls = stand_in(monkeypatch, {}, (DVC,))
    done = quantline("repro", "suite=quick")
    assert done.exit_code == 1
    assert "expected .dvc/config in" in done.output
    assert not calls
    assert not (folder / "params.yaml").exists()


def test_repro_in_a_tree_without_git_says_what_that_leaves_out(folder, monkeypatch):
    stand_in(monkeypatch, {}, (DVC,))
    assert "no git repository here" in quantline("repro", "suite=quick").output
    (folder / ".git").mkdir()
    assert "no git repository here" not in quantline("repro", "suite=quick").output


def test_repro_does_not_show_an_older_page_as_this_runs(folder, monkeypatch):
    stand_in(monkeypatch, {}, (DVC,))
    assert "Ship for" in quantline("repro", "suite=quick").output
    stand_in(monkeypatch, {DVC: 1, "stages.compare": 1}, ())
    done = quantline("repro", "suite=quick")
    assert done.exit_code == 1
    assert "no comparison could be made" in done.output
    assert "Ship for" not in done.output


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

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

program.TIDY_S = 1.0
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


def test_grid_writes_files_that_compose(folder):
    options = ["--bits", "3,2", "--group-size=-1,64", "--suite", "mine"]
    done = quantline("grid", "rtn", *options)
    assert done.exit_code == 0, done.output
    names = ["rtn-w3grow", "rtn-w3g64", "rtn-w2grow", "rtn-w2g64"]
    assert done.output.splitlines() == [
        *(f"recipe {name}, variant {name}" for name in names),
        "conf/suite/mine.yaml has them: quantline repro suite=mine",
    ]
    composed = compose(["suite=mine"])
    assert list(composed["recipes"]) == ["none", *names]
    assert composed["recipes"]["rtn-w2grow"]["group_size"] == -1


def test_grid_takes_a_format_and_values_of_every_kind(folder):
    options = ["--format", "onnx", "--act-order", "true,false", "--damping", "0.05"]
    done = quantline("grid", "gptq", *options, "--budget", "{},{bits: [3, 4], size_mib: 9}")
    assert done.exit_code == 0, done.output
    recipes = compose(["suite=sweep"])["recipes"]
    assert set(recipes) - {"none"} == {
        "gptq-w4g128-damping0_05-budget",
        "gptq-w4g128-damping0_05-budget9mib",
        "gptq-w4g128-act_orderfalse-damping0_05-budget",
        "gptq-w4g128-act_orderfalse-damping0_05-budget9mib",
    }
    assert recipes["gptq-w4g128-damping0_05-budget9mib"]["budget"]["bits"] == [3, 4]
    assert "variant onnx-gptq-w4g128-damping0_05-budget" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gtpq"], "unknown method 'gtpq' (did you mean gptq?)"),
        (["gptq", "--bitts", "3"], "gptq has no option bitts"),
        (["gptq", "--bits", "3,5"], "gptq.bits: "),
        (["gptq", "--bits"], "found --bits without a value"),
        (["gptq", "bits", "3"], "expected --option value,value,…, found bits"),
        (["gptq", "--bits", "[3"], "expected values separated by commas for --bits"),
        (["gptq", "--format", "gguf"], "gguf carries the methods"),
    ],
)
def test_grid_refuses_what_is_unknown_and_writes_nothing(folder, arguments, words):
    before = sorted((folder / "conf").rglob("*"))
    done = quantline("grid", *arguments)
    assert done.exit_code == 1
    assert "config_invalid: " in done.output
    assert words in done.output
    assert sorted((folder / "conf").rglob("*")) == before
