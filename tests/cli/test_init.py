"""`quantline init`: what people say of their project becomes what every composition starts from."""

from pathlib import Path

import pytest

from quantline.cli import init
from quantline.config.compose import compose, load_params
from tests.helpers.command_line import quantline


@pytest.fixture
def outside(folder, tmp_path_factory) -> Path:
    """A model and texts outside the project."""
    place = tmp_path_factory.mktemp("mine")
    (place / "model").mkdir()
    (place / "model/config.json").touch()
    for name in ("train.txt", "test.txt", "gold.jsonl"):
        (place / name).touch()
    return place


def test_init_keeps_what_its_options_say(folder, outside):
    options = ["--model", f"{outside}/model", "--calibration", f"{outside}/train.txt"]
    options += ["--evaluation", f"{outside}/test.txt", "--gold", f"{outside}/gold.jsonl"]
    done = quantline("init", *options, "--target", "edge", "--suite", "quick")
    assert done.exit_code == 0, done.output
    params = load_params()
    assert (params.model.source, params.model.path) == ("local", f"{outside}/model")
    assert params.calibration.path == f"{outside}/train.txt"
    assert params.calibration.part == params.evaluation.part == (0.0, 1.0)  # two files
    assert params.evaluation.gold == f"{outside}/gold.jsonl"
    assert (params.target.name, params.suite) == ("edge", "quick")
    assert compose()["model"]["path"] == f"{outside}/model"


def test_one_file_serves_both_purposes_by_its_halves(folder, outside):
    options = ["--model", f"{outside}/model", "--calibration", f"{outside}/train.txt"]
    assert quantline("init", *options).exit_code == 0
    params = load_params()
    assert params.evaluation.path == f"{outside}/train.txt"
    assert (params.calibration.part, params.evaluation.part) == ((0.0, 0.5), (0.5, 1.0))


def test_init_takes_models_and_texts_of_the_hub(folder):
    options = ["--model", "owner/name@v1", "--calibration", "hub"]
    assert quantline("init", *options).exit_code == 0
    params = load_params()
    assert (params.model.id, params.model.revision) == ("owner/name", "v1")
    assert params.evaluation.source == "hub"
    done = quantline("init", "--model", "qwen3-0.6b", "--calibration", "owner/texts", "--replace")
    assert done.exit_code == 0, done.output
    assert load_params().calibration.dataset == "owner/texts"


def test_init_takes_the_folder_of_a_project(folder, outside, monkeypatch):
    monkeypatch.chdir(outside)
    done = quantline("init", str(folder), "--calibration", "train.txt")
    assert done.exit_code == 0, done.output
    path = f"{outside}/train.txt"  # as seen from where the command was called
    assert load_params(folder / "params.yaml").calibration.path == path


def test_init_replaces_a_choice_only_if_it_is_told_to(folder):
    assert quantline("init", "--suite", "quick").exit_code == 0
    done = quantline("init", "--suite", "narrow")
    assert done.exit_code == 1
    assert "--replace" in done.output
    assert quantline("init", "--suite", "narrow", "--replace").exit_code == 0
    assert load_params().suite == "narrow"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "owner/name"], "give --calibration FILE"),
        (["--model", "nowhere"], "owner/name on the Hub, or one of demo"),
        (["--model", "./nowhere"], "there is no ./nowhere"),
        (
            ["--model", "demo/data", "--calibration", "hub"],
            "with config.json, found none in demo/data",
        ),
        (["--model", ""], "owner/name on the Hub, or one of demo"),
        ([], "expected a choice, found none"),
        (["--calibration", "nowhere.txt"], "there is no nowhere.txt"),
        (["--calibration", "demo/model"], "found the folder demo/model"),
        (["--gold", "nowhere.jsonl"], "say none for no questions"),
        (["--target", "edg"], "did you mean edge?"),
        (["--suite", "quik"], "did you mean quick?"),
        (["nowhere"], "`git clone` it"),
    ],
)
def test_what_init_cannot_take_is_named_and_changes_nothing(folder, options, words):
    before = {path: path.read_bytes() for path in folder.rglob("*.yaml")}
    done = quantline("init", *options)
    assert done.exit_code == 1
    assert words in done.output
    assert {path: path.read_bytes() for path in folder.rglob("*.yaml")} == before


def test_a_wrong_answer_is_asked_for_again(folder, outside, monkeypatch):
    answers = ["nowhere", f"{outside}/model", f"{outside}/train.txt", "", "", "edg", "edge", ""]
    asked: list[str] = []

    def prompt(question: str, default: str) -> str:
        asked.append(question)
        return answers.pop(0) or default

    monkeypatch.setattr(init.typer, "prompt", prompt)
    said = init.ask(folder)
    assert not answers
    assert asked[0] == asked[1]
    assert said == {
        "model": f"{outside}/model",
        "calibration": f"{outside}/train.txt",
        "evaluation": f"{outside}/train.txt",
        "gold": "none",
        "target": "edge",
        "suite": "default",
    }
