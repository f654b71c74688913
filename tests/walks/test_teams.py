"""docs/teams.md, walked by two colleagues: a remote on S3, and a model that only one has."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.clone import Clone
from tests.helpers.project import tiny_inputs
from tests.helpers.s3_server import s3_server

NAME = "quantline-model-any"
# Opens the champion with MLflow alone, from another folder.
OPEN = f"""
import mlflow
mlflow.set_tracking_uri("sqlite:///{{root}}/mlflow.db")
model = mlflow.pyfunc.load_model("models:/{NAME}@champion")
(answer,) = model.predict(["ada met hugo"], params={{{{"max_new_tokens": 3}}}})
(scores,) = model.predict(["ada met hugo"], params={{{{"logprobs": True}}}})
assert isinstance(answer, str), answer
assert scores["logprobs"][-1] < 0 and len(scores["tokens"]) > 1, scores
print("opened in", model.get_raw_model().name)
"""


@pytest.fixture
def remote(monkeypatch) -> Iterator[str]:
    """The address of a server with the bucket `results`."""
    pytest.importorskip("moto", reason="pip install 'quantline[s3-test]'")
    pytest.importorskip("dvc_s3", reason="pip install 'quantline[s3-test]'")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ada")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server("results") as address:
        yield address


@pytest.fixture
def ada(tmp_path, make_model, texts, empty_database) -> Clone:
    """The clone of her who has the model; texts are in git, the model is not."""
    root = tmp_path / "ada"
    clone = Clone.begin(root, [])
    shutil.copytree(texts, root / "texts")
    make_model(tmp_path / "model", num_hidden_layers=1)
    shutil.copy(empty_database, root / "mlflow.db")
    choice = [
        "recipe=[q8_0]",
        "variant=[gguf-q8_0]",
        *tiny_inputs(tmp_path / "model", Path("texts")),
        "evaluation.speed.threads=1",
        "target=any",
        "target.gates=[]",
    ]
    clone.quantline("init", *choice)
    clone.commit("our choice")
    clone.run("git", "init", "--quiet", "--bare", "--initial-branch=main", str(tmp_path / "origin"))
    clone.run("git", "remote", "add", "origin", str(tmp_path / "origin"))
    return clone


def page_of(clone: Clone) -> bytes:
    return (clone.root / "reports/compression.html").read_bytes()


def champion_on_page(clone: Clone) -> str | None:
    """Return the variant that the comparison names as the champion."""
    report = json.loads((clone.root / "reports/compression.json").read_text())
    named = [name for name, one in report["registered"].items() if one["alias"] == "champion"]
    return named[0] if named else None


@pytest.mark.slow
@pytest.mark.e2e
def test_a_colleague_gets_everything_and_rebuilds_nothing(remote, ada, tmp_path, empty_database):
    ada.dvc("remote", "add", "--default", "team", "s3://results/quantline")
    ada.dvc("remote", "modify", "team", "endpointurl", remote)
    ada.quantline("repro")
    ada.commit("results")
    ada.dvc("push")
    ada.run("git", "push", "--quiet", "origin", "main")
    assert "champion" in ada.quantline("promote")
    opened = OPEN.format(root=ada.root)
    assert "opened in llama.cpp" in ada.run(sys.executable, "-c", opened)

    # Hugo has no model.
    (tmp_path / "model").rename(tmp_path / "hers")
    ada.run("git", "clone", "--quiet", str(tmp_path / "origin"), str(tmp_path / "hugo"))
    hugo = Clone(tmp_path / "hugo", [])
    shutil.copy(empty_database, hugo.root / "mlflow.db")
    hugo.dvc("pull")
    assert "is not here" in hugo.quantline("repro")
    assert hugo.finished() == []
    assert page_of(hugo) == page_of(ada)
    assert "meets the target" in hugo.quantline("gate")
    assert "champion" in hugo.quantline("promote")

    # With the model, load runs and finds it the same. The page is made again, once, since it is
    # from before the promotion.
    (tmp_path / "hers").rename(tmp_path / "model")
    assert champion_on_page(hugo) is None
    hugo.quantline("repro")
    stages = [stage for stage, _ in hugo.finished()]
    assert set(stages) <= {"check", "load", "compare"} and stages.count("compare") == 1
    assert champion_on_page(hugo) == "gguf-q8_0"

    # An experiment of hers, in his clone.
    ada.dvc("exp", "run", "--name", "longer", "-S", "target.context=512")
    ada.dvc("exp", "push", "origin", "longer")
    hugo.dvc("exp", "pull", "origin", "longer")
    before = hugo.finished()
    hugo.dvc("exp", "apply", "longer")
    assert "context: 512" in (hugo.root / "params.yaml").read_text()
    assert page_of(hugo) == page_of(ada)
    assert hugo.finished() == before
