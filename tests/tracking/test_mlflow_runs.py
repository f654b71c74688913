"""MLflow: one run a key, in the main repository's database, with nothing private in it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from quantline.config.compose import as_yaml, compose, load_params
from quantline.config.tracking import Tracking
from quantline.errors import ConfigError, Failure, StageError
from quantline.messages import without_secrets
from quantline.run.stage import stage_run
from quantline.tracking.mlflow_runs import DIGEST_LENGTH, KEY, PARENT, log_run, put_below
from quantline.tracking.run_content import (
    Dataset,
    chart_figures,
    evaluation_datasets,
    numbers,
    variant_run,
)
from quantline.tracking.run_origin import git_commit, uncommitted_files, user_name
from quantline.tracking.store import main_root, tracking_uri
from tests.helpers.project import begin_project
from tests.helpers.tracking import client_of, runs


def make_project(root: Path) -> Path:
    begin_project(root)
    (root / "params.yaml").write_text(as_yaml(compose(["suite=quick"], root)))
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch, empty_database) -> Path:
    """A project without a model, with an MLflow database."""
    root = make_project(tmp_path / "project")
    shutil.copy(empty_database, root / "mlflow.db")
    monkeypatch.chdir(root)
    return root


def log_nothing(tracking: Tracking) -> str:
    return log_run(tracking, "a", "a", params={}, metrics={}, tags={})


def test_log_run_gathers_what_stages_add_under_one_key(folder):
    Path("manifest.json").write_text("{}")
    for _ in range(2):
        with stage_run("export", "bf16") as run:
            run.track(
                "bf16:0a",
                "bf16",
                params={"recipe": "none"},
                tags={"artifact_sha256": "0a"},
                files=[Path("manifest.json")],
            )
    with stage_run("evaluate", "bf16") as run:
        run.track("bf16:0a", "bf16", metrics={"mean_kld": 0.25})
    (logged,) = runs(folder)
    assert logged.data.tags[KEY] == "bf16:0a"
    assert logged.data.tags["artifact_sha256"] == "0a"
    assert logged.data.tags["git_commit"]
    assert logged.data.params == {"recipe": "none"}
    assert logged.data.metrics == {"mean_kld": 0.25}
    assert logged.info.status == "FINISHED"
    assert list((folder / "mlartifacts").rglob("manifest.json"))


def test_log_run_lasts_as_long_as_the_stage_that_made_the_run(folder):
    """What is added later, perhaps on another day, does not lengthen it."""
    with stage_run("export", "bf16") as run:
        run._started -= 60
        run.track("bf16:0a", "bf16")
    (made,) = runs(folder)
    assert 60_000 <= made.info.end_time - made.info.start_time < 120_000
    with stage_run("evaluate", "bf16") as run:
        run.track("bf16:0a", "bf16", metrics={"mean_kld": 0.25})
    (later,) = runs(folder)
    assert later.info.start_time == made.info.start_time
    assert later.info.end_time == made.info.end_time
    assert later.data.metrics == {"mean_kld": 0.25}


def test_log_run_says_in_the_experiment_what_its_runs_are(folder):
    with stage_run("load") as run:
        run.track("a", "a")
    tags = client_of(folder).get_experiment_by_name("quantline").tags
    assert "tags.stage = 'evaluate'" in tags["mlflow.note.content"]


def test_log_run_makes_another_run_for_another_key(folder):
    with stage_run("load") as run:
        run.track("a", "a")
        run.track("b", "b")
    assert {logged.data.tags[KEY] for logged in runs(folder)} == {"a", "b"}


def test_log_run_says_who_made_a_run_and_with_what(folder, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    subprocess.run(["git", "init", "-q", "-b", "main"], check=True)
    remote = ["git", "remote", "add", "origin", "https://ada:verysecret@example.org/a.git"]
    subprocess.run(remote, check=True)
    with stage_run("load") as run:
        run.track("a", "a")
    (logged,) = runs(folder)
    tags = logged.data.tags
    assert (logged.info.user_id, tags["mlflow.user"]) == ("ada", "ada")
    assert tags["mlflow.source.name"] == "stages/load.py"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.git.branch"] == "main"
    assert tags["mlflow.source.git.repoURL"] == "https://example.org/a.git"


def test_user_name_is_unknown_where_the_system_knows_none(monkeypatch):
    def fail():
        raise KeyError("uid")

    monkeypatch.setattr("getpass.getuser", fail)
    assert user_name() == "unknown"


def test_put_below_shows_stages_and_variants_below_the_newest_comparison(folder):
    with stage_run("load") as run:
        run.track("model:1", "model", tags={"made": "m1"})
        run.track("model:2", "model", tags={"made": "m2"})
        first = run.track("compare:1", "compare")
        run.track("v:0a", "v", parent="compare:1")
        tracking = run.params.tracking
        assert put_below(tracking, first, [("made", "m1"), ("made", "nobody")]) == 1
    below = {logged.data.tags[KEY]: logged.data.tags.get(PARENT) for logged in runs(folder)}
    assert below == {"model:1": first, "v:0a": first, "model:2": None, "compare:1": None}
    with stage_run("load") as run:
        second = run.track("compare:2", "compare")
        put_below(tracking, second, [("made", "m1"), (KEY, "compare:2")])
    below = {logged.data.tags[KEY]: logged.data.tags.get(PARENT) for logged in runs(folder)}
    assert below["model:1"] == second
    assert below["compare:2"] is None


def test_log_run_logs_nothing_of_the_environment(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_veryprivate")
    with stage_run("load") as run:
        run.track("a", "a", params={"x": 1})
    logged = runs(folder)
    assert logged
    assert "hf_veryprivate" not in str([run.to_dictionary() for run in logged])
    assert "hf_veryprivate" not in Path("events.jsonl").read_text()
    assert b"hf_veryprivate" not in Path("mlflow.db").read_bytes()


@pytest.mark.parametrize("place", [".dvc/tmp/exps/tmpabc", ".dvc/tmp/exps/standalone/tmpabc"])
def test_log_run_of_a_queued_experiment_goes_to_the_main_repository(folder, monkeypatch, place):
    copy = make_project(folder / place)
    monkeypatch.chdir(copy)
    assert main_root() == folder.resolve()
    assert tracking_uri("sqlite:///mlflow.db") == f"sqlite:///{folder.resolve()}/mlflow.db"
    with stage_run("load") as run:
        run.track("a", "a")
    assert len(runs(folder)) == 1
    assert not (copy / "mlflow.db").exists()
    events = (copy / "events.jsonl").read_text()
    assert events
    assert (folder / "events.jsonl").read_text() == events


def test_tracking_uri_leaves_other_addresses_alone(folder):
    for uri in ("sqlite:////abs/mlflow.db", "https://example.org/mlflow"):
        assert tracking_uri(uri) == uri


def test_log_run_names_a_server_that_does_not_answer(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StageError, match="tracking=local") as error:
        log_nothing(Tracking(uri="http://127.0.0.1:9", experiment="x"))
    assert error.value.failure is Failure.NETWORK_UNAVAILABLE


def test_without_secrets_and_the_schema_keep_credentials_out(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    message = without_secrets("API request to https://ada:verysecret@example.org/api failed")
    assert message == "API request to https://example.org/api failed"
    unchecked = Tracking.model_construct(
        uri="http://ada:verysecret@127.0.0.1:9", experiment="x", registry=None
    )
    with pytest.raises(StageError) as error:
        log_nothing(unchecked)
    assert "verysecret" not in str(error.value)
    with pytest.raises(ConfigError, match="no credentials in the address") as error:
        compose(["tracking=server", "tracking.uri=https://ada:verysecret@example.org"], folder)
    assert "verysecret" not in str(error.value)


def test_log_run_flattens_parameters_and_figures_under_names_that_mlflow_takes(folder):
    figures = chart_figures(
        {
            "mean_kld": 0.5,
            "runtime": "1.0",
            "finite": True,
            "gold_tasks": {"sums (hard)": {"accuracy": 1}},
        }
    )
    params = {"method": "kquant", "overrides": {"attn_v": "Q8_0"}}
    with stage_run("load") as run:
        run.track("a", "a", params=params, metrics=figures)
    (logged,) = runs(folder)
    assert logged.data.params == {"method": "kquant", "overrides.attn_v": "Q8_0"}
    assert logged.data.metrics == {"mean_kld": 0.5, "tasks/sums _hard_/accuracy": 1.0}
    assert logged.data.tags["suite"] == "quick"
    assert numbers({"a": None, "b": [1, 2]}) == {}


def test_variant_run_has_the_recipe_and_the_hashes_of_what_the_variant_is_made_from():
    manifest = {
        "variant": "v",
        "artifact_sha256": "0a",
        "recipe": {"name": "r", "method": "rtn", "bits": 4},
        "format": "gguf",
        "runtime": "llama.cpp",
        "source": {"path": "p", "files": {"a": {"sha256": "1"}}},
        "calibration": None,
    }
    described = variant_run(manifest)
    assert (described["key"], described["name"]) == ("v:0a", "v")
    assert described["params"] == {
        "recipe": "r",
        "method": "rtn",
        "bits": 4,
        "format": "gguf",
        "runtime": "llama.cpp",
    }
    assert described["tags"]["calibration_sha256"] == "none"
    changes = {
        "source": {"path": "p", "files": {"a": {"sha256": "2"}}},
        "calibration": {"text_sha256": "cc"},
    }
    changed = variant_run(manifest | changes)
    assert changed["tags"]["source_sha256"] != described["tags"]["source_sha256"]
    assert changed["tags"]["calibration_sha256"] == "cc"


def test_evaluation_datasets_have_their_digests(folder):
    evaluation = load_params().evaluation
    info = {"text_sha256": "a" * 64, "gold_sha256": "b" * 64, "tokens": 9, "gold_items": 3}
    datasets = evaluation_datasets(evaluation, info)
    assert all(isinstance(dataset, Dataset) for dataset in datasets)
    for _ in range(2):
        with stage_run("load") as run:
            run_id = run.track("a", "a", datasets=evaluation_datasets(evaluation, info))
    inputs = client_of(folder).get_run(run_id).inputs.dataset_inputs
    by_name = {entry.dataset.name: entry for entry in inputs}
    assert len(inputs) == 2
    assert set(by_name) == {"evaluation", "gold"}
    gold = by_name["gold"]
    assert gold.dataset.digest == ("b" * 64)[:DIGEST_LENGTH]
    assert json.loads(gold.dataset.profile) == {"items": 3, "sha256": "b" * 64}
    assert json.loads(gold.dataset.source) == {"source": "file", "path": evaluation.gold}
    tags = [(tag.key, tag.value) for tag in gold.tags]
    assert tags == [("mlflow.data.context", "gold")]
    without_gold = evaluation_datasets(evaluation, info | {"gold_sha256": None})
    assert [dataset.name for dataset in without_gold] == ["evaluation"]


def test_git_commit_is_unknown_outside_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == "unknown"
    subprocess.run(["git", "init", "-q"], check=True)
    assert git_commit() == "unknown"  # no commit yet
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    commit = ["commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(["git", *identity, *commit], check=True)
    assert len(git_commit()) == 40
    assert uncommitted_files() == []
    for path in ("conf/größe 1.yaml", "params.yaml", "quantline/a.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert uncommitted_files() == ["conf/größe 1.yaml", "quantline/a.py"]
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"  # no git
    assert uncommitted_files() == []
