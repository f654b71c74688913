"""A params.yaml that is older than conf/ is noticed; one with overrides is not taken for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quantline.config.compose import as_yaml, compose, load_params
from quantline.config.stale import check_fresh
from quantline.errors import StaleError
from tests.helpers.project import ROOT

RECIPE = Path("conf/recipe/gptq-w4g128.yaml")
BASE = Path("conf/recipe/_gptq.yaml")
# What `dvc exp run -S` does, with the settings of .dvc/config, in a process that has composed
# nothing before.
DVC_COMPOSES = """
import os, sys
from dvc.config import Config
from dvc.utils.hydra import compose_and_dump

hydra = Config(dvc_dir=".dvc", validate=True)["hydra"]
assert hydra["enabled"]
compose_and_dump(
    "dvc.out.yaml",
    os.path.abspath(hydra.get("config_dir", "conf")),
    None,
    hydra.get("config_name", "config"),
    os.path.abspath(hydra.get("plugins_path", "")),
    sys.argv[1:],
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project that holds nothing but what composing needs."""
    for name in ("conf", "hydra_plugins", ".dvc"):
        ignored = shutil.ignore_patterns("tmp", "cache", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "demo/model").mkdir(parents=True)
    (tmp_path / "demo/data").mkdir()
    for name in ("calibration.txt", "evaluation.txt", "gold.jsonl"):
        (tmp_path / "demo/data" / name).touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(as_yaml(compose()))
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def give_three_bits(path: Path) -> None:
    """Make a recipe's file ask for other bits than its base file."""
    edit(path, "[_gptq@_here_]", "[_gptq@_here_, _self_]")
    with path.open("a") as file:
        file.write("bits: 3\n")


def test_check_fresh_takes_a_fresh_composition(folder):
    check_fresh(load_params())


@pytest.mark.parametrize(
    "overrides",
    [["recipes.gptq-w4g128.bits=3"], ["suite=quick"], ["target=edge", "seed=7"]],
)
def test_check_fresh_takes_an_override(folder, overrides):
    Path("params.yaml").write_text(as_yaml(compose(overrides)))
    check_fresh(load_params())


def test_check_fresh_takes_an_edit_of_params_by_hand_for_an_override(folder):
    edit(Path("params.yaml"), "damping: 0.01", "damping: 0.05")
    check_fresh(load_params())


def test_check_fresh_says_what_an_edit_of_conf_changes_and_how_to_mend_it(folder):
    give_three_bits(RECIPE)
    with pytest.raises(
        StaleError, match=r"recipes\.gptq-w4g128\.bits: 4 -> 3.*`quantline compose`"
    ):
        check_fresh(load_params())


def test_check_fresh_notices_an_edit_of_the_base_of_a_method(folder):
    edit(BASE, "damping: 0.01", "damping: 0.05")
    with pytest.raises(StaleError, match=r"recipes\.gptq-w4g128\.damping: 0\.01 -> 0\.05"):
        check_fresh(load_params())


def test_check_fresh_notices_an_edit_beside_a_named_choice(folder):
    Path("params.yaml").write_text(as_yaml(compose(["suite=quick"])))
    give_three_bits(RECIPE)
    with pytest.raises(StaleError) as error:
        check_fresh(load_params())
    assert "(recipes.gptq-w4g128.bits: 4 -> 3);" in str(error.value)


def test_check_fresh_notices_a_new_file_in_conf(folder):
    Path("conf/recipe/mine.yaml").write_text("# @package recipes.mine\nmethod: none\n")
    with pytest.raises(StaleError):
        check_fresh(load_params())


def test_check_fresh_says_why_conf_no_longer_composes(folder):
    edit(BASE, "bits: 4", "bits: 5")
    with pytest.raises(StaleError, match=r"recipes\.gptq-w4g128\.bits: .*found 5"):
        check_fresh(load_params())


def test_compose_gives_the_same_values_and_digest_through_dvc(folder):
    overrides = ["suite=quick", "recipes.gptq-w4g128.bits=3"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    subprocess.run(
        [sys.executable, "-c", DVC_COMPOSES, *overrides], check=True, env=environment, timeout=120
    )
    composed_by_dvc = yaml.safe_load(Path("dvc.out.yaml").read_text())
    assert composed_by_dvc == compose(overrides)
    check_fresh(load_params("dvc.out.yaml"))
