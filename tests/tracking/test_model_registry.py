"""A variant becomes one model version for its bytes, with the alias, and only when it may."""

import json
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

from quantline.config.compose import compose, load_params
from quantline.config.tracking import Tracking
from quantline.errors import ConfigError, Failure, StageError
from quantline.paths import EXPORTS, METRICS, REPORTS
from quantline.tracking import model_registry
from quantline.tracking.logged_models import COPY, DATA, BundleDescription
from quantline.tracking.model_registry import Candidate, NoRegistryError, register
from tests.helpers.attacks import tree
from tests.helpers.lineage import vouch_for
from tests.helpers.project import Project
from tests.helpers.report import (
    DECIDED,
    event,
    write_events,
    write_measured,
    write_pick,
)

NAME = "quantline-model-laptop-cpu"
CHOICE = [
    "suite=default",
    "variant=[bf16,gguf-q8_0]",
    "recipe=[none,q8_0]",
    "tracking.registry.promote=auto",
]
OTHER_BYTES = "cd" * 32


@pytest.fixture
def compared(project) -> Project:
    """A project with bf16, and with gguf-q8_0, which is the pick, whose comparison promotes it."""
    project.compose(*CHOICE)
    write_pick()
    return project


def client():
    from mlflow.tracking import MlflowClient

    # MLflow keeps a store open by its address.
    return MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db")


def versions(name: str = NAME) -> list:
    registered = client().search_model_versions(f"name = '{name}'")
    return sorted(registered, key=lambda version: int(version.version))


def copy_of_bundle(version) -> Path:
    """Return the folder that a version keeps its bundle in."""
    return Path(unquote(version.source.removeprefix("file://"))) / DATA / COPY


def champion() -> str:
    return client().get_model_version_by_alias(NAME, "champion").version


def last_event(project: Project) -> dict:
    """Return the last event on the registry."""
    reasons = ("model_registered", "model_not_registered")
    return [line for line in project.events() if line["reason_code"] in reasons][-1]


def test_register_makes_one_version_for_the_same_bytes_and_the_alias_follows_the_pick(compared):
    for is_new in (True, False):
        compared.stage("compare")
        (version,) = versions()
        registered = last_event(compared)
        assert registered["reason_code"] == "model_registered"
        assert registered["payload"]["new"] == is_new
    assert version.tags["artifact_sha256"] == "ab" * 32
    assert version.tags["variant"] == "gguf-q8_0"
    assert "mean_kld <= 0.1 passes" in version.tags["gates"]
    assert (copy_of_bundle(version) / "manifest.json").is_file()
    run = client().get_run(version.run_id)
    assert run.data.tags["target.laptop-cpu"] == "pick"
    assert run.data.params["recipe"] == "q8_0"
    assert champion() == version.version
    write_measured("gguf-q8_0", 4, 0.002, OTHER_BYTES, **DECIDED)
    compared.stage("compare")
    hashes = [version.tags["artifact_sha256"] for version in versions()]
    assert hashes == ["ab" * 32, OTHER_BYTES]
    assert champion() == versions()[-1].version
    write_measured("gguf-q8_0", 3, 0.001, **DECIDED)  # the first bytes again: the alias goes back
    compared.stage("compare")
    assert len(versions()) == 2
    assert champion() == version.version


def test_a_copy_of_a_project_leaves_the_runs_and_the_champion_of_the_original_alone(
    compared, tmp_path, monkeypatch
):
    compared.stage("compare")
    copy = tmp_path / "copy of it"
    shutil.copytree(compared.root, copy)
    original = compared.root
    before = tree(original)
    monkeypatch.chdir(copy)
    compared.root = copy
    compared.compose("target.context=512", *CHOICE)
    compared.stage("compare")
    assert tree(original) == before
    (version,) = versions()
    assert copy_of_bundle(version).is_relative_to(copy / "mlartifacts")
    for run in client().search_runs(["1"]):
        assert run.info.artifact_uri == (copy / "mlartifacts" / run.info.run_id).as_uri() + (
            "/artifacts"
        )


def test_a_version_keeps_its_bytes_when_the_variant_is_made_again(compared):
    readme = EXPORTS / "gguf-q8_0/README.md"
    first = readme.read_bytes()
    compared.stage("compare")
    (version,) = versions()
    readme.write_text("of another export")
    assert (copy_of_bundle(version) / "README.md").read_bytes() == first


def test_promote_registers_nothing_without_a_pick(compared):
    write_measured("gguf-q8_0", 5, 5.0)
    compared.stage("compare")
    assert versions() == []
    assert "no variant meets" in last_event(compared)["summary"]
    assert last_event(compared)["severity"] == "warning"


def test_promote_registers_nothing_whose_required_gate_was_not_checked(compared):
    path = METRICS / "gguf-q8_0.json"
    metrics = json.loads(path.read_text())
    without_gold = {key: value for key, value in metrics.items() if not key.startswith("gold_")}
    assert without_gold != metrics
    path.write_text(json.dumps(without_gold))
    vouch_for("gguf-q8_0", load_params())
    compared.stage("compare")
    assert json.loads((REPORTS / "compression.json").read_text())["pick"] == "gguf-q8_0"
    assert versions() == []
    expected = "gold_accuracy_delta >= -0.02 was not checked"
    assert expected in last_event(compared)["summary"]


def test_promote_registers_nothing_from_a_queued_experiment_or_without_a_registry(
    compared, monkeypatch
):
    monkeypatch.setattr("quantline.report.promotion.in_queued_copy", lambda: True)
    compared.stage("compare")
    assert versions() == []
    assert "queued experiment" in last_event(compared)["summary"]
    compared.compose(*CHOICE, "tracking.registry=null")
    compared.stage("compare")
    assert versions() == []
    assert last_event(compared)["severity"] == "info"
    assert "is null" in last_event(compared)["summary"]


def test_promote_registers_nothing_of_failures_alone(project):
    write_events(event("load", None, "missing_shard"))
    project.stage("compare")
    assert last_event(project)["reason_code"] == "model_not_registered"


TRACKING = Tracking(uri="http://127.0.0.1:9", experiment="x", registry={"name": "n"})


CANDIDATE = Candidate(
    "run", "v:0a", BundleDescription("v", "llama.cpp", "0a", "here", [], [], []), {}, ""
)


def register_anything() -> model_registry.Version:
    return register(TRACKING, CANDIDATE, lambda _: [])


def refuse(code: int):
    """Return what fails as MLflow's client does on an answer with this error code."""
    from mlflow.exceptions import MlflowException

    def fail(*_):
        raise MlflowException("no at https://ada:verysecret@example.org", error_code=code)

    return fail


def refuse_as_unsupported(*_):
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    raise UnsupportedModelRegistryStoreURIException("file:mlruns", ["sqlite"])


def test_register_tells_a_server_without_a_registry_from_one_that_refuses(compared, monkeypatch):
    from mlflow.protos import databricks_pb2 as codes

    for code in (codes.ENDPOINT_NOT_FOUND, codes.FEATURE_DISABLED, codes.NOT_IMPLEMENTED):
        monkeypatch.setattr(model_registry, "_register", refuse(code))
        with pytest.raises(NoRegistryError) as error:
            register_anything()
        assert "verysecret" not in str(error.value)
    monkeypatch.setattr(model_registry, "_register", refuse_as_unsupported)
    with pytest.raises(NoRegistryError, match="functionality is unavailable"):
        register_anything()
    compared.stage("compare")
    line = last_event(compared)
    assert (line["reason_code"], line["severity"]) == ("model_not_registered", "warning")
    assert "keeps no models" in line["summary"]
    assert "verysecret" not in line["summary"]
    monkeypatch.setattr(model_registry, "_register", refuse(codes.PERMISSION_DENIED))
    with pytest.raises(StageError, match="does not take") as failed:
        register_anything()
    assert failed.value.failure is Failure.TRACKING_REFUSED
    assert "verysecret" not in str(failed.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tracking.registry.alias=latest", "keeps latest for itself"),
        ("tracking.registry.alias=v1", "keeps v1 for itself"),
        ("tracking.registry.name=a/b", r"tracking\.registry\.name"),
        ("tracking.registry.nam=x", "did you mean name"),
    ],
)
def test_compose_refuses_a_name_or_alias_that_mlflow_would_refuse(project, override, words):
    with pytest.raises(ConfigError, match=words):
        compose([override])
    assert load_params().tracking.registry.name == NAME
