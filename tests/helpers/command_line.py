"""The command `quantline` in this process, and a project that it finds."""

import shutil
from pathlib import Path

from typer.testing import CliRunner, Result

from quantline import cli
from tests.helpers.project import ROOT, begin_project


def quantline(*arguments: str) -> Result:
    """Run a command of quantline on a terminal of 120 columns."""
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "120"})


def write_empty_project(folder: Path) -> None:
    """Write a project whose inputs are there, empty."""
    begin_project(folder)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    (folder / "demo/model").mkdir(parents=True)
    (folder / "demo/data").mkdir()
    for name in ("calibration.txt", "evaluation.txt", "gold.jsonl"):
        (folder / "demo/data" / name).touch()
