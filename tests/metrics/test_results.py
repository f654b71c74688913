"""The files of a variant's figures: what stands in them, and whose bytes they are of."""

import json

import pytest

from quantline.errors import Failure, StageError
from quantline.files import sha256_file
from quantline.metrics.results import (
    ResultFiles,
    read_lm_eval,
    read_results,
    task_values,
    write_lm_eval,
    write_results,
)
from quantline.paths import METRICS

MANIFEST = {
    "variant": "v",
    "artifact_sha256": "ab" * 32,
    "runtime": "llama.cpp",
    "size_bytes": 2**20,
    "bits_per_weight": 4.5,
    "layer_bits_per_weight": 4.25,
}
MEASURED = {
    "quality": {"mean_kld": 0.25, "perplexity": 3.0},
    "speed": {"decode_tok_s": 90.4},
    "items": [{"id": "a", "correct": True}],
    "runtime_version": "1.0",
}
METRIC = {"value": 0.5, "stderr": None, "higher_is_better": True}


@pytest.fixture
def files(tmp_path) -> ResultFiles:
    return ResultFiles.of(tmp_path, "v")


def test_result_files_have_the_names_that_other_scripts_read(tmp_path, files):
    assert files.quality == tmp_path / "v.json"
    assert files.speed == tmp_path / "v.speed.json"
    assert files.answers == tmp_path / "items/v.json"
    assert files.lm_eval == tmp_path / "v.lm-eval.json"
    assert files.summary == tmp_path / "summary/v.json"


def test_write_results_names_the_bytes_and_the_runtime(files):
    results = write_results(files, MANIFEST, "llama.cpp", MEASURED)
    measured_on = {
        "artifact_sha256": "ab" * 32,
        "runtime": "llama.cpp",
        "runtime_version": "1.0",
    }
    assert json.loads(files.speed.read_text()) == {"decode_tok_s": 90.4} | measured_on
    assert json.loads(files.quality.read_text()) == {
        "mean_kld": 0.25,
        "perplexity": 3.0,
        "size_bytes": 2**20,
        "bits_per_weight": 4.5,
        "layer_bits_per_weight": 4.25,
        "items_sha256": sha256_file(files.answers),
        **measured_on,
    }
    assert json.loads(files.answers.read_text()) == MEASURED["items"]
    assert json.loads(files.summary.read_text()) == {"MiB": 1.0, "KLD": 0.25, "tok/s": 90.4}
    assert read_results(files, MANIFEST) == results
    assert results.summary() == "mean KL divergence 0.25, perplexity 3, 90 tokens/s"


@pytest.mark.parametrize("key", ["artifact_sha256", "runtime"])
def test_read_results_refuses_figures_of_other_bytes_or_another_runtime(files, key):
    write_results(files, MANIFEST, "llama.cpp", MEASURED)
    with pytest.raises(StageError, match=r"v\.json belongs to other bytes") as caught:
        read_results(files, MANIFEST | {key: "other"})
    assert caught.value.failure == Failure.ARTIFACT_CHANGED


def test_read_results_refuses_answers_that_were_edited_or_are_gone(files):
    write_results(files, MANIFEST, "llama.cpp", MEASURED)
    files.answers.write_text(files.answers.read_text().replace("true", "false"))
    with pytest.raises(StageError, match=r"items/v\.json belongs to other bytes"):
        read_results(files, MANIFEST)
    files.answers.unlink()
    with pytest.raises(StageError, match=r"items/v\.json belongs to other bytes"):
        read_results(files, MANIFEST)


@pytest.fixture
def here(tmp_path, monkeypatch) -> ResultFiles:
    """Where the lineage of figures is looked for."""
    monkeypatch.chdir(tmp_path)
    return ResultFiles.of(METRICS, "v")


def test_write_lm_eval_puts_tasks_beside_those_of_the_same_bytes(here):
    files = here
    first = {"runtime_version": "1.0", "lm_eval_version": "0.4", "tasks": {"a": {"n": 1}}}
    write_lm_eval(files, MANIFEST, "llama.cpp", first)
    write_lm_eval(files, MANIFEST, "llama.cpp", first | {"tasks": {"b": {"n": 2}}})
    stored = json.loads(files.lm_eval.read_text())
    assert stored["tasks"] == {"a": {"n": 1}, "b": {"n": 2}}
    assert stored["artifact_sha256"] == "ab" * 32
    assert stored["lm_eval_version"] == "0.4"
    other = MANIFEST | {"artifact_sha256": "cd" * 32}
    write_lm_eval(files, other, "llama.cpp", first | {"tasks": {"c": {"n": 3}}})
    assert json.loads(files.lm_eval.read_text())["tasks"] == {"c": {"n": 3}}


def test_read_lm_eval_takes_results_of_the_same_bytes_in_the_same_runtime_alone(here):
    write_lm_eval(here, MANIFEST, "llama.cpp", {"tasks": {"a": {}}})
    assert read_lm_eval(here, MANIFEST) == {"a": {}}
    assert read_lm_eval(here, MANIFEST | {"artifact_sha256": "cd"}) == {}
    assert read_lm_eval(here, MANIFEST | {"runtime": "other"}) == {}
    assert read_lm_eval(ResultFiles.of(METRICS, "other"), MANIFEST) == {}


def test_read_lm_eval_refuses_results_that_were_edited(here):
    write_lm_eval(here, MANIFEST, "llama.cpp", {"tasks": {"a": {}}})
    here.lm_eval.write_text(here.lm_eval.read_text().replace('"a"', '"b"'))
    with pytest.raises(StageError, match="not what its stage wrote") as caught:
        read_lm_eval(here, MANIFEST)
    assert caught.value.failure == Failure.ARTIFACT_CHANGED


def test_task_values_have_one_name_each():
    tasks = {"arc_easy": {"metrics": {"acc,none": METRIC, "acc_norm,none": METRIC}}}
    assert task_values(tasks) == {"arc_easy/acc/none": 0.5, "arc_easy/acc_norm/none": 0.5}
