"""A variant is a model of MLflow: found by its bytes, with its figures, and without a pickle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantline.config.tracking import Tracking
from quantline.errors import Failure, StageError
from quantline.files import sha256_file, write_json
from quantline.runtimes import mlflow_model
from quantline.runtimes.mlflow_model import BundleModel
from quantline.runtimes.own_tokens import own_tokens
from quantline.tracking.logged_models import COPY, DATA, LOADER, BundleDescription
from quantline.tracking.run_content import Dataset
from quantline.tracking.undelivered import Run, keep, kept, log_or_keep
from tests.helpers.tracking import client_of, local, runs

VOCABULARY = 128
END = 0


class Letters:
    """A runtime whose tokens are letters, and which says the alphabet."""

    name = "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        assert stop == {END}
        return [prompt[-1] + step + 1 for step in range(max_new_tokens)]

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Give a token id / 1000, times one more than the position."""
        _, length = tokens.shape
        steps = np.arange(1, length + 1)[:, None] * np.arange(VOCABULARY) / 1000
        return steps[None].astype(np.float32)


@pytest.fixture
def bundle(project) -> Path:
    """A bundle of one file."""
    folder = project.root / "artifacts/exports/v"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(b"weights")
    entry = {"sha256": sha256_file(folder / "model.gguf"), "bytes": 7}
    manifest = {"variant": "v", "artifact_sha256": "0a" * 32, "files": {"model.gguf": entry}}
    write_json(folder / "manifest.json", manifest)
    return folder


def description(bundle: Path, **values) -> BundleDescription:
    defaults = {
        "variant": "v",
        "runtime": "llama.cpp",
        "artifact_sha256": "0a" * 32,
        "path": str(bundle),
        "begin": [1],
        "ends": [END],
        "requirements": ["quantline==0.1.0"],
    }
    return BundleDescription(**(defaults | values))


def log(bundle: Path, tracking: Tracking, **values) -> str:
    text = Dataset("evaluation", "e" * 64, "evaluation", {"source": "file"}, {"tokens": 9})
    run = Run(
        "v:0a",
        "v",
        params={"bits": 4},
        metrics={"mean_kld": 0.25, "size_bytes": 7},
        tags={"variant": "v", "stage": "evaluate"},
        datasets=[text],
        model=description(bundle, **values),
        logged=1_000_000.0,
    )
    outcome = log_or_keep(tracking, run)
    assert outcome.error is None, outcome.error
    return outcome.run_id


def models(root: Path) -> list:
    client = client_of(root)
    experiment = client.get_experiment_by_name("quantline")
    return client.search_logged_models([experiment.experiment_id])


def opened(model, monkeypatch):
    """Open a model with MLflow, in the runtime of letters."""
    import mlflow

    monkeypatch.setattr(mlflow_model, "open_runtime", lambda name, folder: Letters())
    mlflow.set_tracking_uri(f"sqlite:///{Path.cwd()}/mlflow.db")
    return mlflow.pyfunc.load_model(f"models:/{model.model_id}")


def test_a_variant_becomes_one_model_with_its_figures_and_what_they_were_measured_on(
    project, bundle
):
    for _ in range(2):
        run_id = log(bundle, local(project.root))
    (model,) = models(project.root)
    assert (model.name, str(model.status), model.source_run_id) == ("v", "READY", run_id)
    assert model.params == {"bits": "4"}
    assert model.tags["quantline.key"] == "v:0a"
    figures = {
        metric.key: metric
        for metric in client_of(project.root).get_logged_model(model.model_id).metrics
    }
    assert figures["mean_kld"].value == 0.25
    assert figures["mean_kld"].dataset_name == "evaluation"
    assert figures["size_bytes"].dataset_name is None
    (run,) = runs(project.root)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert run.data.metrics == {"mean_kld": 0.25, "size_bytes": 7}


def test_a_model_holds_no_pickle_and_opens_in_its_runtime(project, bundle, monkeypatch):
    import pandas as pd

    log(bundle, local(project.root))
    (model,) = models(project.root)
    folder = Path(model.artifact_location.removeprefix("file://"))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert "data/variant/bundle.json" in names
    assert {Path(name).suffix for name in names} <= {"", ".json", ".yaml", ".txt"}
    assert LOADER in (folder / "MLmodel").read_text()

    loaded = opened(model, monkeypatch)
    assert loaded.predict(["ab", "x"], params={"max_new_tokens": 2}) == ["cd", "yz"]
    assert loaded.predict(pd.DataFrame({"prompt": ["ab"]}), params={"max_new_tokens": 1}) == ["c"]
    (scores,) = loaded.predict(["ab"], params={"logprobs": True})
    assert scores["tokens"] == [97, 98]
    assert scores["logprobs"] == pytest.approx([0.097, 0.196])
    assert isinstance(loaded.get_raw_model(), Letters)


def test_a_model_opens_only_the_bytes_that_it_was_made_of(project, bundle, monkeypatch):
    log(bundle, local(project.root))
    (model,) = models(project.root)
    (bundle / "model.gguf").write_bytes(b"changed")
    with pytest.raises(StageError, match="is not what its manifest says"):
        opened(model, monkeypatch)
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_json(bundle / "manifest.json", manifest | {"artifact_sha256": "ff" * 32})
    with pytest.raises(StageError, match="dvc pull") as error:
        opened(model, monkeypatch)
    assert error.value.failure is Failure.MISSING_FILE


def test_a_model_with_a_copy_opens_without_the_project(project, bundle, monkeypatch):
    log(bundle, local(project.root), copied=True)
    (model,) = models(project.root)
    shutil.rmtree(bundle)
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert (folder / DATA / COPY / "model.gguf").read_bytes() == b"weights"
    assert opened(model, monkeypatch).predict("a", params={"max_new_tokens": 1}) == ["b"]


def test_a_model_of_an_unknown_runtime_is_named(project, bundle, monkeypatch):
    log(bundle, local(project.root), runtime="nowhere")
    (model,) = models(project.root)
    with pytest.raises(StageError, match="expected a runtime among") as error:
        opened(model, monkeypatch)
    assert error.value.failure is Failure.RUNTIME_UNAVAILABLE


def test_a_model_that_waits_is_made_when_it_is_delivered(down, bundle):
    keep(Run("v:0a", "v", model=description(bundle), parent="compare:1"))
    ((_, run),) = kept()
    assert run.model == description(bundle)
    assert log_or_keep(local(down.root), Run("b", "b")).delivered == 1
    assert [model.name for model in models(down.root)] == ["v"]


def test_logprobs_of_a_text_without_a_begin_token_leave_the_first_open():
    model = BundleModel(Letters(), [], [END])
    assert model.logprobs("ab") == {"tokens": [97, 98], "logprobs": [None, pytest.approx(0.098)]}
    assert model.logprobs("a") == {"tokens": [97], "logprobs": [None]}
    assert model.logprobs("") == {"tokens": [], "logprobs": []}
    assert BundleModel(Letters(), [1], [END]).logprobs("a")["logprobs"] == [pytest.approx(0.097)]


def test_a_model_asks_its_runtime_where_texts_begin_and_end_if_no_file_says_so():
    class Serving(Letters):
        def encode_whole(self, text: str) -> list[int]:
            return [1, *self.encode(text), 2]

        def stops_at(self, token: int) -> bool:
            return token in (0, 3)

    assert own_tokens(Serving()) == ([1], [0, 3])
    with pytest.raises(StageError, match="says where a text ends") as error:
        own_tokens(Letters())
    assert error.value.failure is Failure.MISSING_TOKENIZER


def test_predict_takes_texts_alone():
    import pandas as pd

    model = BundleModel(Letters(), [], [END])
    with pytest.raises(ValueError, match="one column"):
        model.predict(pd.DataFrame({"a": ["x"], "b": ["y"]}))
    with pytest.raises(ValueError, match="expected texts, found int"):
        model.predict([3])
