"""`quantline compose`: params.yaml is written where it can be, and says what changes."""

import errno
import os
from pathlib import Path

import pytest

from quantline.config.compose import load_params
from tests.helpers.command_line import quantline


def test_compose_writes_params_and_says_what_changes(folder):
    done = quantline("compose", "suite=quick")
    assert done.exit_code == 0
    assert load_params().suite == "quick"
    done = quantline("compose", "suite=quick", "recipes.gptq-w4g128.bits=3")
    assert "recipes.gptq-w4g128.bits: 4 -> 3" in done.output
    before = Path("params.yaml").stat().st_mtime_ns
    done = quantline("compose", "suite=quick", "recipes.gptq-w4g128.bits=3")
    assert "as before" in done.output
    assert Path("params.yaml").stat().st_mtime_ns == before


def test_compose_works_from_a_folder_inside_the_project(folder, monkeypatch):
    monkeypatch.chdir(folder / "conf/suite")
    assert quantline("compose").exit_code == 0
    assert (folder / "params.yaml").is_file()
    assert not (folder / "conf/suite/params.yaml").exists()


@pytest.mark.parametrize("content", [None, b"", b"- a\n", b"a: [", b"\xff\xfe\0", b"foreign: 1\n"])
def test_compose_writes_a_params_yaml_that_cannot_be_read_anew(folder, content):
    if content is not None:
        Path("params.yaml").write_bytes(content)
        for command in ("gate", "pick", "verify"):
            done = quantline(command)
            assert done.exit_code == 1
            assert "config_invalid" in done.output
    done = quantline("compose", "suite=quick")
    assert done.exit_code == 0
    assert "params.yaml: new" in done.output
    assert load_params().suite == "quick"


def test_compose_needs_no_home(folder, monkeypatch):
    monkeypatch.delenv("HOME")
    assert quantline("compose", "suite=quick").exit_code == 0


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_named_and_changes_nothing(folder, monkeypatch, number):
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), ".quantline")

    monkeypatch.setattr(Path, "mkdir", refuse)
    for command in (["compose"], ["repro"], ["init", "suite=quick"], ["grid", "gptq"]):
        done = quantline(*command)
        assert done.exit_code == 1
        assert "permission_denied" in done.output
        assert ".quantline" in done.output
    assert not (folder / "params.yaml").exists()


def test_compose_outside_a_project_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = quantline("compose")
    assert done.exit_code == 1
    assert "expected dvc.yaml and conf/" in done.output
