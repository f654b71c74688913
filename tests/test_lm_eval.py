"""lm-evaluation-harness on a bundle: one's own tasks, what they give, and what is refused."""

import json

import pytest
from typer.testing import CliRunner

from stages import cli, compare
from quantline.text.tokenizer import Tokenizer
from quantline.config.compose import load_params
from stages.lm_eval import arguments, told
from quantline.metrics.lm_eval_model import Answers
from quantline.report import page
from quantline.runtimes.runtime import open_runtime
from quantline.errors import Failure, Reason, StageError
from quantline.files import write_json

NAME = "gguf-q8_0"
QUESTIONS = [{"question": f"who met hugo by the river on day {index}?", "choices": ["ada", "nico and rosa"], "right": index % 2} for index in range(6)]
DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}}}}}\ntest_split: test\n"
TASKS = {
    "mine_choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{right}}"\n'
                   "metric_list: [{metric: acc}]\n",
    "mine_rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
                    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]\n",
    "mine_written": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "ada"\n'
                    'generation_kwargs: {until: ["the"], max_gen_toks: 8, do_sample: false}\nmetric_list: [{metric: exact_match}]\n',
}


@pytest.fixture
def built(project):
    """A project with the GGUF variant exported, and tasks of its own in tasks/."""
    project.compose("suite=default", f"variant=[{NAME}]", "recipe=[q8_0]")
    for name, instance in (("load", None), ("calibrate", None), ("quantize", "q8_0"), ("export", NAME)):
        project.stage(name, instance)
    folder = project.root / "tasks"
    folder.mkdir()
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for task, text in TASKS.items():
        (folder / f"{task}.yaml").write_text(f"task: {task}\n{DATA.format(path=path)}{text}metadata: {{version: 1.0}}\n")
    return project


def run(project, *given, code=0):
    done = project.command("lm_eval", NAME, *given)
    assert done.returncode == code, done.stderr
    return done


def test_where_it_is_not_installed_the_error_says_how(project, monkeypatch):
    from stages import lm_eval as stage

    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"pip install 'quantline\[lm-eval\]'") as error:
        stage.measure(arguments([NAME, "--tasks", "arc_easy"]), load_params())
    assert error.value.failure == Failure.RUNTIME_UNAVAILABLE


def test_a_bundle_that_is_not_what_its_manifest_says_is_refused_before_anything_runs(built):
    path = built.root / f"artifacts/exports/{NAME}/model.gguf"
    path.write_bytes(path.read_bytes() + b"x")
    assert "model.gguf is not what its manifest says" in run(built, "--tasks", "mine_choice", code=1).stderr
    assert built.events()[-1]["payload"]["failure"] == Failure.ARTIFACT_CHANGED


def results(**values):
    base = {"results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "bleu,first": 3, "bleu_stderr,first": "N/A", "n": 7}},
            "versions": {"a": 2.0}, "n-shot": {"a": 5}, "n-samples": {"a": {"original": 9, "effective": 4}},
            "higher_is_better": {"a": {"acc": True}}}
    base["results"]["a"] |= values
    return base


def test_what_is_kept_of_the_results():
    assert told(results(), arguments(["v", "--tasks", "a", "--limit", "4"])) == {"a": {
        "metrics": {"acc,none": {"value": 0.5, "stderr": 0.1, "higher_is_better": True},
                    "bleu,first": {"value": 3.0, "stderr": None, "higher_is_better": None}},
        "version": 2.0, "fewshot": 5, "documents": 4, "limit": 4, "chat": False}}
    with pytest.raises(StageError, match="expected a finite acc of a, found nan"):
        told(results(**{"acc,none": float("nan")}), arguments(["v", "--tasks", "a"]))


def test_the_command_gives_its_options_on_and_tells_of_the_page(project, monkeypatch):
    called = []
    monkeypatch.setattr(cli, "_run", lambda *given: called.append(given) or int(given[1] == "b"))
    done = CliRunner().invoke(cli.app, ["lm-eval", "a", "b", "--tasks", "x,y", "--include-path", "tasks", "--limit", "5", "--chat"])
    options = ("--tasks=x,y", f"--include-path={project.root / 'tasks'}", "--limit=5", "--chat")
    assert called == [("stages.lm_eval", "a", *options), ("stages.lm_eval", "b", *options),
                      ("dvc", "repro", "--quiet", "--single-item", "compare")]
    assert done.exit_code == 1 and "failed: b" in done.output and "compression.html" in done.output


def test_the_report_takes_results_of_the_same_bytes_alone(project):
    write_json(compare.METRICS / f"{NAME}.lm-eval.json", {"artifact_sha256": "ab", "tasks": {"a": {}}})
    assert compare.harness_of(NAME, {"artifact_sha256": "ab"}) == {"a": {}}
    assert compare.harness_of(NAME, {"artifact_sha256": "cd"}) == {} == compare.harness_of("other", {"artifact_sha256": "ab"})


def test_the_page_has_a_column_for_each_metric():
    from test_report import report, row

    task = told(results(), arguments(["v", "--tasks", "a"]))
    text = page.html(report([row("one", 2, 0.01, lm_eval=task), row("two", 3, 0.02, lm_eval={}), row("three", 4, 0.03)]))
    assert text.count("acc,none, higher is better") == 1 and "0.5 ± 0.1<small>4 documents, 5 shots</small>" in text
    assert 'id="lm-eval"' in text and 'id="lm-eval"' not in page.html(report([row("three", 4, 0.03)]))


def test_tasks_of_ones_own_are_measured_beside_one_another(built):
    pytest.importorskip("lm_eval", reason="the extra lm-eval")
    folder = str(built.root / "tasks")
    run(built, "--tasks", "mine_choice,mine_rolling", "--include-path", folder)
    first = json.loads((built.root / f"metrics/{NAME}.lm-eval.json").read_text())
    assert set(first["tasks"]) == {"mine_choice", "mine_rolling"} and first["tasks"]["mine_choice"]["documents"] == 6
    answers = Answers(open_runtime("llama.cpp", built.root / f"artifacts/exports/{NAME}", 1), Tokenizer(built.root / "artifacts/model"), 256)
    right = 0
    for one in QUESTIONS:
        likelihoods = [value for value, _ in answers.loglikelihood([Asked(one["question"], f" {choice}") for choice in one["choices"]])]
        right += likelihoods.index(max(likelihoods)) == one["right"]
    assert first["tasks"]["mine_choice"]["metrics"]["acc,none"]["value"] == pytest.approx(right / 6)
    run(built, "--tasks", "mine_written", "--include-path", folder, "--limit", "2")
    after = json.loads((built.root / f"metrics/{NAME}.lm-eval.json").read_text())
    assert set(after["tasks"]) == {"mine_choice", "mine_rolling", "mine_written"} and after["tasks"]["mine_written"]["documents"] == 2
    assert after["tasks"]["mine_rolling"] == first["tasks"]["mine_rolling"]
    run(built, "--tasks", "mine_choice,mine_rolling", "--include-path", folder)
    assert json.loads((built.root / f"metrics/{NAME}.lm-eval.json").read_text()) == after  # the same to the last digit


def test_tasks_that_cannot_be_taken_are_named(built):
    pytest.importorskip("lm_eval", reason="the extra lm-eval")
    assert "expected tasks of lm-evaluation-harness, found no_such_task" in run(built, "--tasks", "no_such_task", code=1).stderr
    last = built.events()[-1]
    assert (last["reason_code"], last["payload"]["failure"]) == (Reason.EVAL_DATASET_MISSING, Failure.DATASET_INVALID)
    (built.root / "tasks/questions.jsonl").unlink()
    assert "look at the task's file" in run(built, "--tasks", "mine_choice", "--include-path", str(built.root / "tasks"), code=1).stderr


class Asked:
    def __init__(self, *args):
        self.args = args
