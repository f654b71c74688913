"""`quantline repro`, with DVC's part played by a stand-in."""

import json
import shutil
from pathlib import Path

import pytest

from quantline.cli import dvc, repro
from quantline.config.compose import load_params
from quantline.files import write_json, write_text
from tests.helpers.command_line import quantline
from tests.helpers.report import MEASURED_FIGURES

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
            "metrics": MEASURED_FIGURES,
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


def test_repro_does_not_leave_the_model_and_texts_of_the_last_run_unasked(folder, monkeypatch):
    mine = Path("mine.txt")
    mine.write_text("a text of my own\n")
    stand_in(monkeypatch, {}, (DVC,))
    own = "evaluation.path=mine.txt"
    assert "Ship for" in quantline("repro", "suite=quick", own).output
    before = Path("params.yaml").read_bytes()
    done = quantline("repro")
    assert (done.exit_code, Path("params.yaml").read_bytes()) == (1, before)
    assert "evaluation.path: 'mine.txt' -> " in done.output
    assert "give the overrides again" in done.output
    # The suite may be another, and what an override or an edit of conf/ names is asked for.
    assert "Ship for" in quantline("repro", own).output
    assert "Ship for" in quantline("repro", "evaluation=demo").output
    assert "Ship for" in quantline("repro", own).output
    Path("conf/new.yaml").write_text("{}\n")
    assert "Ship for" in quantline("repro").output
    assert load_params().evaluation.path != "mine.txt"


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
