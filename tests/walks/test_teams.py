"""docs/teams.md, typed word for word by two colleagues who share a remote on S3 and MLflow."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.clone import Clone
from tests.helpers.mlflow_server import mlflow_server
from tests.helpers.project import tiny_inputs
from tests.helpers.s3_server import s3_server
from tests.helpers.walker import LINK, MAKE, Walker, make_origin

VARIANT = "gguf-q8_0"
NAME = "quantline-model-any"
# Opens the champion with MLflow alone, from another folder.
OPEN = f"""
import mlflow
mlflow.set_tracking_uri("{{address}}")
model = mlflow.pyfunc.load_model("models:/{NAME}@champion")
(answer,) = model.predict(["ada met hugo"], params={{{{"max_new_tokens": 3}}}})
(scores,) = model.predict(["ada met hugo"], params={{{{"logprobs": True}}}})
assert isinstance(answer, str), answer
assert scores["logprobs"][-1] < 0 and len(scores["tokens"]) > 1, scores
print("opened in", model.get_raw_model().name)
"""


@pytest.fixture
def remote(monkeypatch) -> Iterator[str]:
    """The address of a server of S3 with the bucket `results`."""
    pytest.importorskip("moto", reason="pip install 'quantline[s3-test]'")
    pytest.importorskip("dvc_s3", reason="pip install 'quantline[s3-test]'")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ada")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server("results") as address:
        yield address


@pytest.fixture
def server(tmp_path, empty_database) -> Iterator[str]:
    """The address of MLflow's server."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    with mlflow_server(folder / "files", f"sqlite:///{folder}/mlflow.db") as address:
        yield address


def page_of(clone: Clone) -> bytes:
    return (clone.root / "reports/compression.html").read_bytes()


def champion_on_page(clone: Clone) -> str | None:
    """Return the variant that the comparison names as the champion."""
    report = json.loads((clone.root / "reports/compression.json").read_text())
    named = [name for name, one in report["registered"].items() if one["alias"] == "champion"]
    return named[0] if named else None


def begin(walker: Walker, origin: Path, model: Path, texts: Path, server: str) -> None:
    """Begin the team's project, and leave the walker in it.

    Args:
        walker: Of the page.
        origin: The team's repository.
        model: Ada has it, in a folder that is not in git.
        texts: Folder of texts and questions, which are.
        server: Address of MLflow's.
    """
    tiny = tiny_inputs(model, Path("texts"))
    small = " ".join(
        f"'{one}'" for one in tiny if one.startswith("evaluation.s") or ".length" in one
    )
    sizes = "calibration.part=[0.0,1.0] calibration.sequences=8 evaluation.part=[0.0,1.0]"
    chosen = f"recipe=[q8_0] variant=[{VARIANT}] evaluation.speed.threads=1 target.gates=[]"
    code = walker.block("quantline init")
    code = code.replace("&& source", f"&& cp -r {texts} texts && source")
    walker.types(
        code,
        {
            "<address>": str(origin),
            MAKE: LINK,
            "/models/mine": str(model),
            "texts/train.txt": "texts/calibration.txt",
            "texts/test.txt": "texts/evaluation.txt",
            "questions.jsonl": "texts/gold.jsonl",
            "tracking.uri=https://mlflow.example.org": (
                f"tracking.uri={server} --target any {chosen} {sizes} {small}"
            ),
        },
    )
    walker.folder /= "quantline"


@pytest.mark.slow
@pytest.mark.e2e
def test_a_colleague_gets_everything_and_rebuilds_nothing(
    remote, server, tmp_path, make_model, texts
):
    origin = make_origin(tmp_path / "origin")
    make_model(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "ada").mkdir()
    page = Walker(tmp_path / "ada", "teams.md")
    begin(page, origin, tmp_path / "model", texts, server)
    ada = Clone(page.folder, [])

    page.types(page.line("s3://"), {"s3://bucket/quantline": "s3://results/quantline"})
    ada.dvc("remote", "modify", "team", "endpointurl", remote)
    page.types(page.line('"A remote for results"'))
    page.types(page.block("dvc push\n"))
    assert "champion" in ada.quantline("promote")
    opened = OPEN.format(address=server)
    assert "opened in llama.cpp" in ada.run(sys.executable, "-c", opened)

    # Hugo has no model.
    (tmp_path / "model").rename(tmp_path / "hers")
    (tmp_path / "hugo").mkdir()
    his = Walker(tmp_path / "hugo", "teams.md")
    printed = his.types(his.block("dvc pull\n"), {"<address>": str(origin), MAKE: LINK})
    his.folder /= "quantline"
    hugo = Clone(his.folder, [])
    assert "is not here" in printed
    assert hugo.finished() == []
    assert page_of(hugo) == page_of(ada)
    assert "meets the target" in hugo.quantline("gate")
    edge = hugo.quantline("pick", "target=edge", "target.gates=[]")  # which has a limit of memory
    assert f"Ship for edge: {VARIANT}" in edge
    assert "version 1, champion, as before" in hugo.quantline("promote")

    # With the model, load runs and finds it the same. The page is made again, once, since it is
    # from before the promotion.
    (tmp_path / "hers").rename(tmp_path / "model")
    assert champion_on_page(hugo) is None
    hugo.quantline("repro")
    stages = [stage for stage, _ in hugo.finished()]
    assert set(stages) <= {"check", "load", "compare"} and stages.count("compare") == 1
    assert champion_on_page(hugo) == VARIANT

    # An experiment of hers, in his clone.
    ada.dvc("exp", "run", "--name", "longer", "-S", "target.context=512")
    push, pull, apply = page.block("dvc exp push").splitlines()
    page.types(push, {"<name>": "longer"})
    assert "longer" in hugo.dvc("exp", "list", "origin", "--all-commits")
    his.types(pull, {"<name>": "longer"})
    before = hugo.finished()
    his.types(apply, {"<name>": "longer"})
    assert "context: 512" in (hugo.root / "params.yaml").read_text()
    assert page_of(hugo) == page_of(ada)
    assert hugo.finished() == before
