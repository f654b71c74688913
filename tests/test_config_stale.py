"""A params.yaml that is older than conf/ is noticed; one with overrides is not taken for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quantline.config.compose import StaleError, as_yaml, check_fresh, compose, load_params

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Path("conf/recipe/gptq-w4g128.yaml")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project that holds nothing but what composing needs."""
    for name in ("conf", "hydra_plugins", ".dvc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("tmp", "cache", "__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(as_yaml(compose()))
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_fresh_composition_is_not_stale(folder):
    check_fresh(load_params())


@pytest.mark.parametrize("overrides", [["recipes.gptq-w4g128.bits=3"], ["suite=quick"], ["target=edge", "seed=7"]])
def test_an_override_is_not_stale(folder, overrides):
    Path("params.yaml").write_text(as_yaml(compose(overrides)))
    check_fresh(load_params())


def test_an_edit_of_params_by_hand_is_an_override(folder):
    edit(Path("params.yaml"), "damping: 0.01", "damping: 0.05")
    check_fresh(load_params())


def test_an_edit_of_conf_is_stale_and_the_message_says_what_and_how_to_mend_it(folder):
    edit(RECIPE, "bits: 4", "bits: 3")
    with pytest.raises(StaleError, match=r"recipes\.gptq-w4g128\.bits: 4 -> 3.*`quantline compose`"):
        check_fresh(load_params())


def test_a_named_choice_does_not_hide_the_edit(folder):
    Path("params.yaml").write_text(as_yaml(compose(["suite=quick"])))
    edit(RECIPE, "bits: 4", "bits: 3")
    with pytest.raises(StaleError) as error:
        check_fresh(load_params())
    assert "(recipes.gptq-w4g128.bits: 4 -> 3);" in str(error.value)


def test_a_new_file_in_conf_is_stale(folder):
    Path("conf/recipe/mine.yaml").write_text("# @package recipes.mine\nmethod: none\n")
    with pytest.raises(StaleError):
        check_fresh(load_params())


def test_conf_that_no_longer_composes_is_stale_and_says_why(folder):
    edit(RECIPE, "bits: 4", "bits: 5")
    with pytest.raises(StaleError, match=r"recipes\.gptq-w4g128\.bits: .*found 5"):
        check_fresh(load_params())


def test_dvc_composes_to_the_same_values_and_digest(folder):
    """What `dvc exp run -S` does, with the settings of .dvc/config, in a process that has composed nothing before."""
    script = """
import os, sys
from dvc.config import Config
from dvc.utils.hydra import compose_and_dump
hydra = Config(dvc_dir=".dvc", validate=True)["hydra"]
assert hydra["enabled"]
compose_and_dump("dvc.out.yaml", os.path.abspath(hydra.get("config_dir", "conf")), None,
                 hydra.get("config_name", "config"), os.path.abspath(hydra.get("plugins_path", "")), sys.argv[1:])
"""
    subprocess.run([sys.executable, "-c", script, "suite=quick", "recipes.gptq-w4g128.bits=3"], check=True,
                   env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}, timeout=120)
    made = yaml.safe_load(Path("dvc.out.yaml").read_text())
    assert made == compose(["suite=quick", "recipes.gptq-w4g128.bits=3"])
    check_fresh(load_params("dvc.out.yaml"))
