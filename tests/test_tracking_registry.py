"""The model registry: the pick becomes one version for its bytes, with the alias, and only when it may."""

import json
from pathlib import Path

import pytest
from test_compare import event, events, measured

from stages import compare as stage
from quantline.config.compose import compose, load_params
from quantline.config.params import Tracking
from quantline.config.section import ConfigError
from quantline.errors import Failure, StageError
from quantline.tracking import model_registry as registry
from quantline.tracking.model_registry import NoRegistry


@pytest.fixture
def compared(project):
    """bf16, and gguf-q8_0, which is the pick."""
    project.compose("suite=default", "variant=[bf16,gguf-q8_0]", "recipe=[none,q8_0]")
    measured("bf16", 10, 0)
    measured("gguf-q8_0", 5, 0.001)
    return project


def client():
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db")  # MLflow keeps a store open by its address


def versions(name: str = "quantline-laptop-cpu") -> list:
    return sorted(client().search_model_versions(f"name = '{name}'"), key=lambda one: int(one.version))


def said(project) -> dict:
    """The last event on the registry."""
    return [one for one in project.events() if one["reason_code"] in ("model_registered", "model_not_registered")][-1]


def test_the_pick_is_one_version_for_its_bytes_and_the_alias_follows_the_pick(compared):
    for new in (True, False):
        compared.stage("compare")
        (one,) = versions()
        event = said(compared)
        assert (event["reason_code"], event["payload"]["new"]) == ("model_registered", new)
    assert one.tags["artifact_sha256"] == "ab" * 32 and one.tags["variant"] == "gguf-q8_0"
    assert "mean_kld <= 0.1 passes" in one.tags["gates"]
    assert one.source == (Path.cwd() / "artifacts/exports/gguf-q8_0").as_uri()
    assert client().get_run(one.run_id).data.tags["target.laptop-cpu"] == "pick"
    assert client().get_run(one.run_id).data.params["recipe"] == "q8_0"
    assert client().get_model_version_by_alias("quantline-laptop-cpu", "champion").version == one.version
    measured("gguf-q8_0", 5, 0.002, "cd" * 32)
    compared.stage("compare")
    assert [one.tags["artifact_sha256"] for one in versions()] == ["ab" * 32, "cd" * 32]
    assert client().get_model_version_by_alias("quantline-laptop-cpu", "champion").version == versions()[-1].version
    measured("gguf-q8_0", 5, 0.001)  # the first bytes again: the alias goes back
    compared.stage("compare")
    assert len(versions()) == 2
    assert client().get_model_version_by_alias("quantline-laptop-cpu", "champion").version == one.version


def test_an_uploaded_version_has_the_bundle_among_its_runs_artifacts(compared):
    compared.compose("suite=default", "variant=[bf16,gguf-q8_0]", "recipe=[none,q8_0]", "tracking.registry.upload=true",
                     "tracking.registry.name=mine", "tracking.registry.alias=staging")
    compared.stage("compare")
    (one,) = versions("mine")
    assert one.source.endswith("/artifacts/bundle") and "mlartifacts" in one.source
    assert (Path(one.source.removeprefix("file://")) / "manifest.json").is_file()


def test_nothing_is_registered_without_a_pick(compared):
    measured("gguf-q8_0", 5, 5.0)
    compared.stage("compare")
    assert versions() == [] and "no variant meets" in said(compared)["summary"]
    assert said(compared)["severity"] == "warning"


def test_nothing_is_registered_whose_required_gate_was_not_checked(compared):
    path = stage.METRICS / "gguf-q8_0.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                if not key.startswith("gold_")}))
    compared.stage("compare")
    assert json.loads((stage.REPORTS / "compression.json").read_text())["pick"] == "gguf-q8_0"
    assert versions() == [] and "gold_accuracy_delta >= -0.02 was not checked" in said(compared)["summary"]


def test_nothing_is_registered_from_a_queued_experiment_or_if_it_is_not_asked_for(compared, monkeypatch):
    monkeypatch.setattr("quantline.report.promotion.in_queued_copy", lambda: True)
    compared.stage("compare")
    assert versions() == [] and "queued experiment" in said(compared)["summary"]
    compared.compose("suite=default", "variant=[bf16,gguf-q8_0]", "recipe=[none,q8_0]", "tracking.registry=null")
    compared.stage("compare")
    assert versions() == [] and (said(compared)["severity"], "is null" in said(compared)["summary"]) == ("info", True)


def test_a_server_without_a_registry_is_said_and_one_that_refuses_is_a_failure(compared, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2 as codes
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    def unsupported(*_):
        raise UnsupportedModelRegistryStoreURIException("file:mlruns", ["sqlite"])

    def broken(code):
        def refuse(*_):
            raise MlflowException("no at https://ada:verysecret@example.org", error_code=code)
        return refuse

    tracking = Tracking(uri="http://127.0.0.1:9", experiment="x", registry={"name": "n", "upload": True})
    for code in (codes.ENDPOINT_NOT_FOUND, codes.FEATURE_DISABLED, codes.NOT_IMPLEMENTED):
        monkeypatch.setattr(registry, "_register", broken(code))
        with pytest.raises(NoRegistry) as error:
            registry.register(tracking, "run", Path("bundle"), {}, "")
        assert "verysecret" not in str(error.value)
    with pytest.raises(NoRegistry, match="functionality is unavailable"):
        monkeypatch.setattr(registry, "_register", unsupported)
        registry.register(tracking, "run", Path("bundle"), {}, "")
    compared.stage("compare")
    assert (said(compared)["reason_code"], said(compared)["severity"]) == ("model_not_registered", "warning")
    assert "keeps no models" in said(compared)["summary"] and "verysecret" not in said(compared)["summary"]
    monkeypatch.setattr(registry, "_register", broken(codes.PERMISSION_DENIED))
    with pytest.raises(StageError, match="does not take") as failed:
        registry.register(tracking, "run", Path("bundle"), {}, "")
    assert failed.value.failure is Failure.NETWORK_UNAVAILABLE and "verysecret" not in str(failed.value)


@pytest.mark.parametrize(("override", "said"), [
    ("tracking.registry.alias=latest", "keeps latest for itself"), ("tracking.registry.alias=v1", "keeps v1 for itself"),
    ("tracking.registry.name=a/b", "tracking.registry.name"), ("tracking.uri=http://here", "takes no path of this machine"),
    ("tracking.registry.nam=x", "did you mean name")])
def test_a_name_or_alias_that_mlflow_would_refuse_is_told_before_anything_runs(project, override, said):
    with pytest.raises(ConfigError, match=said):
        compose([override])
    assert load_params().tracking.registry.name == "quantline-laptop-cpu"


def test_the_report_of_failures_alone_registers_nothing(project):
    events(event("load", None, "missing_shard"))
    project.stage("compare")
    assert said(project)["reason_code"] == "model_not_registered"
