"""A project's own choice, kept in conf/experiment/."""

from pathlib import Path

import pytest

from quantline.config.compose import compose, load_params
from tests.helpers.command_line import quantline, write_empty_project


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write_empty_project(tmp_path)
    (tmp_path / "größe, #1").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


OVERRIDES = [
    "model=local",
    "model.path=größe, #1",
    "target=edge",
    "target.max_memory_mib=512",
    "recipes.gptq-w4g128.bits=3",
    "+variant=gguf-f16",
    'evaluation.smoke_prompts=["Größe:", "${model.path}"]',
]


def test_what_init_keeps_is_what_every_composition_starts_from(folder):
    expected = compose(OVERRIDES) | {"suite": "mine", "conf_sha256": ""}
    done = quantline("init", *OVERRIDES)
    assert done.exit_code == 0, done.output
    assert compose() | {"conf_sha256": ""} == expected
    assert load_params().model.path == "größe, #1"
    assert {path.parent.name for path in (folder / "conf").glob("*/mine.yaml")} == {
        *("evaluation", "experiment", "model", "suite", "target"),
    }
    again = compose(["suite=quick", "model.path=demo/model"])
    assert again["model"]["path"] == "demo/model"
    assert again["target"]["max_memory_mib"] == 512
    assert "gguf-f16" not in again["variants"]
    assert compose(["experiment=none"])["model"]["source"] == "demo"


def test_init_again_changes_nothing_or_says_that_the_name_is_taken(folder):
    assert quantline("init", "suite=quick").exit_code == 0
    assert quantline("init", "suite=quick").exit_code == 0
    done = quantline("init", "suite=narrow")
    assert done.exit_code == 1
    assert "choose another --name" in done.output
    assert quantline("init", "suite=narrow", "--name", "those").exit_code == 0
    assert compose()["suite"] == "narrow"


@pytest.mark.parametrize(
    "choice",
    [
        ["model=demo"],
        ["model=hub", "model.id=ada/model"],
        ["target=laptop-cpu"],
        ["evaluation=demo"],
        ["tracking=local"],
        ["executor=local"],
    ],
)
def test_another_choice_of_a_group_has_nothing_of_what_init_has_kept(folder, choice):
    own = [
        *(one for one in OVERRIDES if "smoke_prompts" not in one),
        "evaluation.smoke_tokens=9",
        *("tracking=server", "tracking.uri=https://example.org"),
        *("executor=ray", "executor.address=auto", "executor.workers=3"),
    ]
    assert quantline("init", *own).exit_code == 0
    kept = compose()
    assert kept["executor"]["workers"] == 3
    group = choice[0].partition("=")[0]
    expected = kept | {group: compose(["experiment=none", *choice])[group]}
    found = compose(choice)
    for one in (expected, found):
        del one["conf_sha256"], one["tracking"]["registry"]["name"]  # which has the model's in it
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=local", "model.path=nowhere"], "model.path: there is no nowhere"),
        (["--name", "none"], "expected a name of"),
        (["--name", "../x"], "expected a name of"),
        (["~evaluation.limits"], "expected overrides that set something"),
        (["experiment=none"], "expected overrides that set something"),
        (["recipe=gtpq"], "did you mean"),
    ],
)
def test_what_init_refuses_changes_nothing(folder, arguments, words):
    before = {path: path.read_bytes() for path in folder.rglob("*.yaml")}
    done = quantline("init", *arguments)
    assert done.exit_code == 1
    assert words in done.output
    assert {path: path.read_bytes() for path in folder.rglob("*.yaml")} == before


def test_init_of_another_name_does_not_leave_the_projects_model_and_texts_unasked(folder):
    (folder / "mine.txt").touch()
    own = "evaluation.path=mine.txt"
    assert quantline("init", own).exit_code == 0
    done = quantline("init", "suite=quick", "--name", "other")
    assert done.exit_code == 1
    assert "evaluation.path: 'mine.txt' -> 'demo/data/evaluation.txt'" in done.output
    assert not (folder / "conf/experiment/other.yaml").exists()
    assert quantline("init", "suite=quick", own, "--name", "other").exit_code == 0


def test_init_says_what_line_it_looks_for(folder):
    config = folder / "conf/config.yaml"
    config.write_text(config.read_text().replace("  - experiment: none\n", ""))
    done = quantline("init", "suite=quick")
    assert done.exit_code == 1
    assert "experiment" in done.output
