"""lm-evaluation-harness on a bundle: one's own tasks, what they give, and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantline import cli
from quantline.cli.dvc import PROGRAM, REFUSALS
from quantline.errors import Failure, Reason
from quantline.metrics.lm_eval_model import RuntimeLM
from quantline.paths import EXPORTS, METRICS, MODEL
from quantline.runtimes.runtime import open_runtime
from quantline.text.tokenizer import Tokenizer
from tests.helpers.gguf import file_of
from tests.helpers.project import Project

NAME = "gguf-q8_0"
CHOICES = ["ada", "nico and rosa"]
QUESTIONS = [
    {
        "question": f"who met hugo by the river on day {index}?",
        "choices": CHOICES,
        "right": index % 2,
    }
    for index in range(6)
]
# Task → what its YAML file says besides where its data is.
TASKS = {
    "mine_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}]
""",
    "mine_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "mine_written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "ada"
generation_kwargs: {until: ["the"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
DATA = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
metadata: {{version: 1.0}}
"""


class Request:
    """A request of the harness: `args` are the context and its continuation."""

    def __init__(self, *args: str) -> None:
        self.args = args


@pytest.fixture
def built(project) -> Project:
    """A project with the GGUF variant exported, and tasks of its own in tasks/."""
    project.compose("suite=default", f"variant=[{NAME}]", "recipe=[q8_0]")
    for stage in ("load", "calibrate"):
        project.stage(stage)
    project.stage("quantize", "q8_0")
    project.stage("export", NAME)
    folder = project.root / "tasks"
    folder.mkdir()
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for task, text in TASKS.items():
        (folder / f"{task}.yaml").write_text(DATA.format(task=task, path=path) + text)
    return project


def run(project: Project, *arguments: str, code: int = 0):
    done = project.command("lm_eval", NAME, *arguments)
    assert done.returncode == code, done.stderr
    return done


def results() -> dict:
    return json.loads((METRICS / f"{NAME}.lm-eval.json").read_text())


@pytest.mark.slow
def test_lm_eval_refuses_a_changed_bundle_before_anything_runs(built):
    path = file_of(EXPORTS / NAME)
    path.write_bytes(path.read_bytes() + b"x")
    done = run(built, "--tasks", "mine_choice", code=1)
    assert ".gguf is not what its manifest says" in done.stderr
    assert built.events()[-1]["payload"]["failure"] == Failure.ARTIFACT_CHANGED


def test_lm_eval_command_passes_its_options_on_and_names_the_page(project, monkeypatch):
    calls = []

    def run_module(module: str, *arguments: str) -> int:
        calls.append((module, *arguments))
        return int(arguments[0] == "b")

    monkeypatch.setattr("quantline.cli.lm_eval.run_module", run_module)
    monkeypatch.setattr("quantline.cli.dvc.run_module", run_module)
    options = ["--tasks", "x,y", "--include-path", "tasks", "--limit", "5", "--chat"]
    done = CliRunner().invoke(cli.app, ["lm-eval", "a", "b", *options])
    folder = project.root / "tasks"
    passed_on = ("--tasks=x,y", f"--include-path={folder}", "--limit=5", "--chat")
    assert calls == [
        ("stages.lm_eval", "a", *passed_on),
        ("stages.lm_eval", "b", *passed_on),
        (PROGRAM, str(REFUSALS), "repro", "--quiet", "--single-item", "compare"),
    ]
    assert done.exit_code == 1
    assert "failed: b" in done.output
    assert "compression.html" in done.output


def share_of_right_choices(bundle: Path) -> float:
    """Return how often the right choice is the likeliest, by the bundle's own runtime."""
    model = RuntimeLM(open_runtime("llama.cpp", bundle, 1), Tokenizer(MODEL), 256)
    right = 0
    for question in QUESTIONS:
        requests = [Request(question["question"], f" {choice}") for choice in question["choices"]]
        likelihoods = [value for value, _ in model.loglikelihood(requests)]
        right += likelihoods.index(max(likelihoods)) == question["right"]
    return right / len(QUESTIONS)


@pytest.mark.slow
def test_lm_eval_measures_ones_own_tasks_beside_one_another(built):
    pytest.importorskip("lm_eval", reason="the extra lm-eval")
    own = ("--include-path", str(built.root / "tasks"))
    run(built, "--tasks", "mine_choice,mine_rolling", *own)
    first = results()["tasks"]
    assert set(first) == {"mine_choice", "mine_rolling"}
    assert first["mine_choice"]["documents"] == 6
    accuracy = first["mine_choice"]["metrics"]["acc,none"]["value"]
    assert accuracy == pytest.approx(share_of_right_choices(EXPORTS / NAME))

    run(built, "--tasks", "mine_written", *own, "--limit", "2")
    both = results()
    assert set(both["tasks"]) == {"mine_choice", "mine_rolling", "mine_written"}
    assert both["tasks"]["mine_written"]["documents"] == 2
    assert both["tasks"]["mine_rolling"] == first["mine_rolling"]
    run(built, "--tasks", "mine_choice,mine_rolling", *own)
    assert results() == both  # the same to the last digit


def test_lm_eval_names_tasks_that_cannot_be_taken(built):
    pytest.importorskip("lm_eval", reason="the extra lm-eval")
    done = run(built, "--tasks", "no_such_task", code=1)
    assert "expected tasks of lm-evaluation-harness, found no_such_task" in done.stderr
    event = built.events()[-1]
    assert event["reason_code"] == Reason.EVAL_DATASET_MISSING
    assert event["payload"]["failure"] == Failure.DATASET_INVALID
    (built.root / "tasks/questions.jsonl").unlink()
    own = ("--include-path", str(built.root / "tasks"))
    assert "look at the task's file" in run(built, "--tasks", "mine_choice", *own, code=1).stderr
