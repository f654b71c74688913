"""What `dvc exp run` composes keeps the project's model, texts and suite, and finds its inputs."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from quantline.config.compose import present_params
from quantline.run.dvc_composition import register_for_dvc, say_in_our_words
from tests.helpers.command_line import quantline, write_empty_project


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project in git, with a model beside it, and one in it that git ignores."""
    root = tmp_path / "the project"
    root.mkdir()
    write_empty_project(root)
    (root / "demo/model/config.json").write_text("{}")
    (root / ".gitignore").write_text("/models/\n")
    (root / "models/mine").mkdir(parents=True)
    shutil.copy(root / ".gitignore", root / "models/mine/config.json")
    (tmp_path / "größe").mkdir()
    for command in (["init", "-q"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.chdir(root)
    return root


def dvc_composes(monkeypatch, *options: str) -> dict[str, Any]:
    """Do in this process what `dvc exp run` does to params.yaml."""
    monkeypatch.setattr(sys, "argv", ["dvc", "exp", "run", *options])
    register_for_dvc()
    named = [value for option, value in itertools.pairwise(options) if option == "-S"]
    with initialize_config_dir(str(Path("conf").resolve()), version_base=None):
        config = hydra_compose("config", overrides=named)
    OmegaConf.resolve(config)
    return OmegaConf.to_container(config)  # type: ignore[return-value]


def event() -> dict[str, Any]:
    """Return the last run event."""
    return json.loads(Path("events.jsonl").read_text().splitlines()[-1])


def test_a_sweep_does_not_leave_the_projects_model_unasked(folder, monkeypatch, capsys):
    assert quantline("compose", "model=local", "model.path=../größe").exit_code == 0
    for options in ([], ["-S", 'model.path="../größe"']):
        with pytest.raises(SystemExit):
            dvc_composes(monkeypatch, *options)
        said = capsys.readouterr().err
        assert "model.source: 'local' -> 'demo'" in said
        assert "quantline init" in said
        assert event()["reason_code"] == "config_invalid"
        assert event()["summary"] in said
    asked = dvc_composes(monkeypatch, "-S", "model=local", "-S", 'model.path="../größe"')
    assert asked["model"]["path"] == "../größe"
    assert dvc_composes(monkeypatch, "-S", "model=demo")["model"]["source"] == "demo"


def test_a_sweep_does_not_leave_the_projects_suite_or_texts_unasked(folder, monkeypatch, capsys):
    quantline("compose", "suite=quick", "evaluation.sequences=8", "+variant=gguf-f16")
    for options in (
        ["-S", "suite=quick"],
        ["-S", "evaluation.sequences=8", "-S", "variant=[bf16]"],
    ):
        with pytest.raises(SystemExit):
            dvc_composes(monkeypatch, *options)
        assert "would change what no -S asks for" in capsys.readouterr().err
    asked = ["-S", "suite=quick", "-S", "evaluation.sequences=8", "-S", "+variant=gguf-f16"]
    assert "gguf-f16" in dvc_composes(monkeypatch, *asked)["variants"]


def test_a_sweep_starts_from_what_init_has_kept(folder, monkeypatch):
    done = quantline("init", "model=local", "model.path=../größe", "suite=quick", "seed=4")
    assert done.exit_code == 0, done.output
    composed = dvc_composes(monkeypatch, "-S", "recipes.gptq-w4g128.bits=3")
    assert composed["model"]["path"] == "../größe"
    assert composed["suite"] == "quick"
    assert composed["seed"] == 4
    assert composed["recipes"]["gptq-w4g128"]["bits"] == 3


@pytest.mark.parametrize("content", [None, "", "- 3\n", "a: [\n"])
def test_a_params_yaml_that_cannot_be_read_has_nothing_to_keep(folder, content):
    if content is not None:
        Path("params.yaml").write_text(content)
    assert present_params() == {}


@pytest.mark.parametrize(
    ("option", "path", "expected"),
    [
        ("--temp", "../größe", "{root}/../größe"),
        ("--queue", "models/mine", "{root}/models/mine"),
        ("--temp", "demo/model", "demo/model"),
        ("--force", "../größe", "../größe"),  # in the workspace
    ],
)
def test_a_copy_finds_inputs_that_git_does_not_have(folder, monkeypatch, option, path, expected):
    named = ["-S", "model=local", "-S", f'model.path="{path}"', "-S", "suite=quick"]
    model = dvc_composes(monkeypatch, option, *named)["model"]
    whole = os.path.normpath(expected.format(root=folder))
    assert model["path"] in (whole, expected)
    assert model["watch"] == model["adapter_watch"] == model["path"]


def test_a_copy_does_not_find_a_folder_of_which_git_has_a_part(folder, monkeypatch):
    (folder / "demo/model/model.safetensors").touch()
    model = dvc_composes(monkeypatch, "--temp")["model"]
    assert model["path"] == str(folder / "demo/model")


def test_an_input_that_is_not_there_is_named_before_anything_runs(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        dvc_composes(monkeypatch, "--temp", "-S", "model=local", "-S", "model.path=../nowhere")
    assert "model.path: there is no ../nowhere in" in capsys.readouterr().err
    assert event()["payload"]["failure"] == "config_invalid"


@pytest.mark.parametrize(
    ("override", "words"),
    [("suite=quik", "did you mean quick?"), ("+suite=quick", "without the plus sign")],
)
def test_dvc_says_hydras_errors_in_words_of_this_project(folder, monkeypatch, override, words):
    monkeypatch.setattr(sys, "argv", ["dvc", "exp", "run", "-S", override])
    conf = initialize_config_dir(str(Path("conf").resolve()), version_base=None)
    with conf, pytest.raises(HydraException) as caught:
        hydra_compose("config", overrides=[override])
    record = logging.makeLogRecord(
        {"msg": "unexpected error", "exc_info": (caught.type, caught.value, caught.tb)}
    )
    assert say_in_our_words(record)
    said = record.getMessage()
    assert said.startswith("config_invalid: ")
    assert words in said
    assert record.exc_info is None
    other = logging.makeLogRecord({"msg": "no lock", "exc_info": (OSError, OSError("x"), None)})
    assert say_in_our_words(other)
    assert other.getMessage() == "no lock"


def test_a_queue_that_dvc_could_not_work_off_is_refused(folder, monkeypatch, capsys):
    git = ["git", "config", "user.name", "Jürgen"]
    subprocess.run(git, cwd=folder, check=True)
    with pytest.raises(SystemExit):
        dvc_composes(monkeypatch, "--queue", "-S", "seed=1")
    assert "--temp in place of --queue" in event()["summary"]
    assert dvc_composes(monkeypatch, "--temp", "-S", "seed=1")["seed"] == 1


@pytest.mark.slow
def test_an_experiment_runs_in_a_project_whose_git_config_has_other_letters(folder):
    """DVC writes the configuration of the experiment's own repository anew."""
    (folder / "dvc.yaml").write_text("stages: {one: {cmd: echo done, params: [seed]}}\n")
    project = folder.rename(folder.parent / "größtes Projekt")
    assert quantline("compose").exit_code == 0
    git = ["git", "-c", "user.email=nobody@nowhere"]
    for command in (
        ["config", "user.name", "Jürgen"],
        ["add", "--all"],
        ["commit", "--quiet", "-m", "start"],
    ):
        subprocess.run([*git, *command], cwd=project, check=True)
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "-S", "seed=1"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Ran experiment" in done.stdout
