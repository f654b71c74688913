"""MLflow: one run a key, in the main repository's database, with nothing in it that should stay private."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from quantline.config.compose import as_yaml, compose, load_params
from quantline.config.params import Tracking
from quantline.config.section import ConfigError
from quantline.errors import Failure, StageError
from quantline.run.stage import stage_run
from quantline.tracking.mlflow_runs import (
    KEY,
    MAX_DIGEST,
    Dataset,
    evaluation_datasets,
    figures,
    git_commit,
    main_root,
    numbers,
    of_variant,
    record,
    tracking_uri,
    without_secrets,
)

ROOT = Path(__file__).resolve().parent.parent


def make_project(root: Path) -> Path:
    root.mkdir(parents=True)
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / "params.yaml").write_text(as_yaml(compose(["suite=quick"], root)))
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch, empty_database) -> Path:
    root = make_project(tmp_path / "project")
    shutil.copy(empty_database, root / "mlflow.db")
    monkeypatch.chdir(root)
    return root


def runs(root: Path) -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("quantline")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def test_the_same_key_is_one_run_and_gathers_what_stages_add(folder):
    Path("manifest.json").write_text("{}")
    for _ in range(2):
        with stage_run("export", "bf16") as run:
            run.track("bf16:0a", "bf16", params={"recipe": "none"}, tags={"artifact_sha256": "0a"},
                      files=[Path("manifest.json")])
    with stage_run("evaluate", "bf16") as run:
        run.track("bf16:0a", "bf16", metrics={"mean_kld": 0.25})
    (one,) = runs(folder)
    assert one.data.tags[KEY] == "bf16:0a" and one.data.tags["artifact_sha256"] == "0a"
    assert one.data.params == {"recipe": "none"} and one.data.metrics == {"mean_kld": 0.25}
    assert one.data.tags["git_commit"] and one.info.status == "FINISHED"
    assert list((folder / "mlartifacts").rglob("manifest.json"))


def test_a_run_lasts_as_long_as_the_stage_that_made_it(folder):
    """What is added later, perhaps on another day, does not lengthen it."""
    with stage_run("export", "bf16") as run:
        run.began -= 60
        run.track("bf16:0a", "bf16")
    (made,) = runs(folder)
    assert 60_000 <= made.info.end_time - made.info.start_time < 120_000
    with stage_run("evaluate", "bf16") as run:
        run.track("bf16:0a", "bf16", metrics={"mean_kld": 0.25})
    (later,) = runs(folder)
    assert (later.info.start_time, later.info.end_time) == (made.info.start_time, made.info.end_time)
    assert later.data.metrics == {"mean_kld": 0.25}


def test_the_experiment_says_what_its_runs_are(folder):
    from mlflow.tracking import MlflowClient

    with stage_run("load") as run:
        run.track("a", "a")
    tags = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_experiment_by_name("quantline").tags
    assert "tags.stage = 'evaluate'" in tags["mlflow.note.content"]


def test_another_key_is_another_run(folder):
    with stage_run("load") as run:
        run.track("a", "a")
        run.track("b", "b")
    assert {one.data.tags[KEY] for one in runs(folder)} == {"a", "b"}


def test_nothing_of_the_environment_is_logged(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_veryprivate")
    with stage_run("load") as run:
        run.track("a", "a", params={"x": 1})
    assert "hf_veryprivate" not in str([one.to_dictionary() for one in runs(folder)])
    assert "hf_veryprivate" not in Path("events.jsonl").read_text()
    assert b"hf_veryprivate" not in Path("mlflow.db").read_bytes()


@pytest.mark.parametrize("place", [".dvc/tmp/exps/tmpabc", ".dvc/tmp/exps/standalone/tmpabc"])
def test_a_queued_experiment_logs_to_the_main_repository(folder, monkeypatch, place):
    copy = make_project(folder / place)
    monkeypatch.chdir(copy)
    assert main_root() == folder.resolve()
    assert tracking_uri("sqlite:///mlflow.db") == f"sqlite:///{folder.resolve()}/mlflow.db"
    with stage_run("load") as run:
        run.track("a", "a")
    assert len(runs(folder)) == 1 and not (copy / "mlflow.db").exists()
    assert (folder / "events.jsonl").read_text() == (copy / "events.jsonl").read_text() != ""


def test_other_uris_are_left_alone(folder):
    for uri in ("sqlite:////abs/mlflow.db", "https://example.org/mlflow"):
        assert tracking_uri(uri) == uri


def test_a_server_that_does_not_answer_is_named(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StageError, match="tracking=local") as error:
        record(Tracking(uri="http://127.0.0.1:9", experiment="x"), "a", "a", {}, {}, {}, [])
    assert error.value.failure is Failure.NETWORK_UNAVAILABLE


def test_no_credentials_are_said_or_kept(folder):
    said = without_secrets("API request to https://ada:verysecret@example.org/api failed")
    assert said == "API request to https://example.org/api failed"
    with pytest.raises(StageError) as error:
        record(Tracking.model_construct(uri="http://ada:verysecret@127.0.0.1:9", experiment="x", registry=None), "a", "a",
               {}, {}, {}, [])
    assert "verysecret" not in str(error.value)
    with pytest.raises(ConfigError, match="no credentials in the address") as error:
        compose(["tracking=server", "tracking.uri=https://ada:verysecret@example.org"], folder)
    assert "verysecret" not in str(error.value)


def test_nested_parameters_and_figures_are_logged_flat_and_under_names_that_mlflow_takes(folder):
    with stage_run("load") as run:
        run.track("a", "a", params={"method": "kquant", "overrides": {"attn_v": "Q8_0"}},
                  metrics=figures({"mean_kld": 0.5, "runtime": "1.0", "finite": True,
                                   "gold_tasks": {"sums (hard)": {"accuracy": 1}}}))
    (one,) = runs(folder)
    assert one.data.params == {"method": "kquant", "overrides.attn_v": "Q8_0"}
    assert one.data.metrics == {"mean_kld": 0.5, "tasks/sums _hard_/accuracy": 1.0}
    assert one.data.tags["suite"] == "quick" and numbers({"a": None, "b": [1, 2]}) == {}


def test_the_run_of_a_variant_has_its_recipe_and_the_hashes_of_what_it_is_made_from():
    manifest = {"variant": "v", "artifact_sha256": "0a", "recipe": {"name": "r", "method": "rtn", "bits": 4}, "format": "gguf",
                "runtime": "llama.cpp", "source": {"path": "p", "files": {"a": {"sha256": "1"}}}, "calibration": None}
    about = of_variant(manifest)
    assert (about["key"], about["name"]) == ("v:0a", "v")
    assert about["params"] == {"recipe": "r", "method": "rtn", "bits": 4, "format": "gguf", "runtime": "llama.cpp"}
    other = of_variant(manifest | {"source": {"path": "p", "files": {"a": {"sha256": "2"}}},
                                   "calibration": {"text_sha256": "cc"}})
    assert about["tags"]["source_sha256"] != other["tags"]["source_sha256"]
    assert (about["tags"]["calibration_sha256"], other["tags"]["calibration_sha256"]) == ("none", "cc")


def test_the_gold_set_and_the_evaluation_text_are_data_sets_with_their_digests(folder):
    from mlflow.tracking import MlflowClient

    evaluation = load_params().evaluation
    info = {"text_sha256": "a" * 64, "gold_sha256": "b" * 64, "tokens": 9, "gold_items": 3}
    for _ in range(2):
        with stage_run("load") as run:
            key = run.track("a", "a", datasets=evaluation_datasets(evaluation, info))
    inputs = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_run(key).inputs.dataset_inputs
    found = {one.dataset.name: one for one in inputs}
    assert len(inputs) == 2 and set(found) == {"evaluation", "gold"}
    assert found["gold"].dataset.digest == ("b" * 64)[:MAX_DIGEST]
    assert json.loads(found["gold"].dataset.profile) == {"items": 3, "sha256": "b" * 64}
    assert json.loads(found["gold"].dataset.source) == {"source": "file", "path": evaluation.gold}
    assert [(tag.key, tag.value) for tag in found["gold"].tags] == [("mlflow.data.context", "gold")]
    assert [one.name for one in evaluation_datasets(evaluation, info | {"gold_sha256": None})] == ["evaluation"]
    assert isinstance(evaluation_datasets(evaluation, info)[0], Dataset)


def test_the_commit_is_unknown_outside_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == "unknown"
    subprocess.run(["git", "init", "-q"], check=True)
    assert git_commit() == "unknown"  # no commit yet
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "x"],
                   check=True)
    assert len(git_commit()) == 40
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"  # no git
