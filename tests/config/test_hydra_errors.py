"""Every error of Hydra says what mends it here."""

import shutil
from pathlib import Path

import pytest

from quantline.config.compose import compose
from quantline.errors import ConfigError
from tests.helpers.project import ROOT

HYDRAS_WORDS = ("defaults list", "struct", "Config search path", "hydra.cc", "append to")


@pytest.fixture
def root(tmp_path) -> Path:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    return tmp_path


def refused(root: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, root)
    said = str(caught.value)
    assert not any(words in said for words in HYDRAS_WORDS), said
    return said


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("+suite=quick", "without the plus sign, suite=..."),
        ("+experiment=none", "without the plus sign, experiment=..."),
        ("+seed=3", "change it without the plus sign: seed=..."),
        ("suite@x=quick", "leave out what comes after the @: suite=..."),
        ("recipes.foo.bits=3", "`quantline list recipes` has the names"),
        ("recipes.q6_k.mix=Q6_K", "add it with +recipe=q6_k and a variant of it"),
        ("variants.gguf-f16.dtype=float16", "add it with +variant=gguf-f16"),
        ("~model", "choose another: model=..."),
        ("~suite=default", "choose another: suite=..."),
        ("~recipe", "leave one recipe out: ~recipes.<name>"),
        ("~recipes.foo", "no such key to leave out"),
        ("~variants.bf16=3", "write ~variants.bf16"),
        ("model=null", "there are demo, hub"),
        ("model.path=${nope}", "write \\${nope} if these very letters are meant"),
        ("seed=${oc.env:QUANTLINE_NOPE}", "set it, or take ${oc.env:QUANTLINE_NOPE} out"),
        ("seed=${foo:a}", "no function that conf/ knows"),
        ("model=local", "give one: model.path=..."),
    ],
)
def test_an_override_that_does_not_fit_is_told_with_its_remedy(root, override, remedy):
    assert remedy in refused(root, override)


def test_a_file_that_names_what_there_is_not_is_named(root):
    suite = "# @package _global_\ndefaults:\n  - /recipe: [none, foo]\nsuite: mine\n"
    (root / "conf/suite/mine.yaml").write_text(suite)
    said = refused(root, "suite=mine")
    assert "conf/suite/mine.yaml names recipe/foo" in said
    assert "write that file" in said


def test_a_file_that_chooses_twice_is_told_how_to_override(root):
    (root / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [/model: hub]\n"
    )
    assert "`- override /model: ...`" in refused(root, "experiment=mine")


def test_what_nobody_foresaw_keeps_hydras_words_with_a_remedy(root):
    (root / "conf/config.yaml").unlink()
    assert "git checkout conf" in refused(root)
