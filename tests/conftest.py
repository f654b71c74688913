"""Tiny models, texts and projects for the tests. Nothing here reaches the network."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    GOMP_SPINCOUNT="0",
    TOKENIZERS_PARALLELISM="false",
    DO_NOT_TRACK="true",
    MLFLOW_DISABLE_TELEMETRY="true",
)
# Tests compare results with torch's on the CPU, often to the bit.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.models import sentences, write_model
from tests.helpers.plots import drawn_once
from tests.helpers.project import Project, begin_project
from tests.helpers.workers_here import HereWorkers, use_workers_here

# With torch and transformers in the process, each full collection looks at a million objects.
gc.set_threshold(50_000, 20, 50)

# No files, no clock, no luck.
settings.register_profile("quantline", database=None, deadline=None, derandomize=True)
settings.load_profile("quantline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, which makes what they share once.

    The models of tests/families are shared by the files of that folder.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            folder = item.path.parent
            name = folder.name if folder.name == "families" else f"{folder.name}/{item.path.stem}"
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session", autouse=True)
def plots_drawn_once() -> Iterator[None]:
    """Pages with the same plot share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantline.report.page.pareto_svg", drawn_once)
        yield


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """make_model(folder, model_type="llama", **config) writes a tiny random model."""
    return write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Llama, hidden 256, grouped-query attention, tied head, bfloat16. Copy it to change it."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_narrow(tmp_path_factory) -> Path:
    """Llama in float32 whose widths (64, 176) fit no k-quant, with a head of its own."""
    import torch

    return write_model(
        tmp_path_factory.mktemp("narrow") / "model",
        hidden_size=64,
        intermediate_size=176,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype=torch.float32,
        seed=1,
    )


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with calibration.txt, evaluation.txt and gold.jsonl that share nothing."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "calibration.txt").write_text("\n\n".join(sentences(1, 40)) + "\n")
    (folder / "evaluation.txt").write_text("\n\n".join(sentences(2, 30)) + "\n")
    items: list[dict] = [
        {
            "id": f"open-{number}",
            "task": "open",
            "prompt": f"Question number {number}: who met hugo by the river?",
            "answer": " ada",
        }
        for number in range(4)
    ]
    items += [
        {
            "id": f"choice-{number}",
            "task": "choice",
            "prompt": f"Choose for case {number}, was it rain or snow then?",
            "answer": " rain",
            "choices": [" rain", " old snow"],
        }
        for number in range(4)
    ]
    question = "What did rosa find in the old boat?"
    items.append(
        {
            "id": "chat-0",
            "task": "chat",
            "prompt": question,
            "answer": "a letter",
            "messages": [{"role": "user", "content": question}],
        }
    )
    lines = [json.dumps(item) + "\n" for item in items]
    (folder / "gold.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """An MLflow database without runs: making its tables takes seconds, copying it none."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model, texts, empty_database) -> Project:
    """A fresh project on the tiny model; the working folder is inside it."""
    root = begin_project(tmp_path / "project")
    shutil.copy(empty_database, root / "mlflow.db")
    monkeypatch.chdir(root)
    made = Project(root, tiny_model, texts)
    made.compose()
    return made


@pytest.fixture
def workers_here(monkeypatch) -> Callable[..., list[HereWorkers]]:
    """workers_here(lose) has items done in this process; see HereWorkers."""

    def use(lose: Callable[[int], bool | None] = lambda number: False) -> list[HereWorkers]:
        return use_workers_here(monkeypatch, lose)

    return use
