"""Stages under odd umasks, clocks, locales, and without a home: the same bytes as anywhere else."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.injection import files_of, run_stage
from tests.helpers.models import write_model
from tests.helpers.project import ROOT, Project, begin_project

FAR = {"before 1970": -86400.0, "1970": 0.0, "2500": 16_725_225_600.0}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, texts) -> Path:
    """A project in which nothing has run."""
    folder = tmp_path_factory.mktemp("environments")
    model = write_model(
        folder / "source", hidden_size=64, intermediate_size=128, num_key_value_heads=4
    )
    root = begin_project(folder / "fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        choice = ["variant=[bf16]", "recipe=[none]"]
        few = [f"{part}.{size}" for part in ("calibration", "evaluation") for size in SIZES]
        Project(root, model, texts).compose(*choice, *few)
    return root


SIZES = ("sequences=2", "length=16")


def made(fresh: Path, name: str, prepare: Callable[[], None] | None = None) -> Path:
    """Return a project in which load and calibrate have run."""
    root = fresh.parent / name
    shutil.copytree(fresh, root)
    for stage in ("load", "calibrate"):
        outcome = run_stage(root, stage, None, None, prepare)
        assert outcome.code == 0, outcome.words
    return root


@pytest.fixture(scope="module")
def usual(fresh) -> dict[str, str]:
    return files_of(made(fresh, "usual"), "artifacts")


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_stages_keep_the_users_umask(fresh, usual, umask):
    root = made(fresh, f"umask {umask}", lambda: os.umask(umask) and None)
    assert files_of(root, "artifacts") == usual
    written = [root / "events.jsonl", *(root / ".quantline").glob("*.json")]
    for path in [*(root / "artifacts").rglob("*"), *written]:
        status = path.stat()
        if path.is_file() and status.st_nlink > 1:
            continue  # the user's own file
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert status.st_mode & 0o777 == wanted, path


def test_stages_need_no_home(fresh, usual):
    def prepare() -> None:
        for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "HF_HOME"):
            os.environ.pop(name, None)

    assert files_of(made(fresh, "homeless", prepare), "artifacts") == usual


@pytest.mark.parametrize("when", FAR)
def test_stages_do_not_depend_on_the_clock(fresh, usual, when):
    """A machine whose battery is empty, one whose clock is wrong, and files of both."""
    seconds = FAR[when]
    root = fresh.parent / f"clock {when}"

    def prepare() -> None:
        time.time = lambda: seconds
        for path in root.rglob("*"):
            if path.is_file():
                os.utime(path, (max(seconds, 0), max(seconds, 0)))

    assert files_of(made(fresh, root.name, prepare), "artifacts") == usual


@pytest.mark.parametrize("locale", ["C", pytest.param("tr_TR.ISO-8859-9", marks=pytest.mark.slow)])
def test_a_stage_works_in_an_odd_locale(fresh, empty_database, locale):
    root = fresh.parent / locale
    shutil.copytree(fresh, root)
    shutil.copy(empty_database, root / "mlflow.db")
    odd = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "stages.check"],
        cwd=root,
        env={**os.environ, **odd, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
