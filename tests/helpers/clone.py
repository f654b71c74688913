"""A clone of the project, as a user has it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.project import ROOT, read_events

FILES = (
    "quantline",
    "stages",
    "conf",
    "hydra_plugins",
    "dvc.yaml",
    "pyproject.toml",
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
)
IDENTITY = {
    "GIT_AUTHOR_NAME": "nobody",
    "GIT_AUTHOR_EMAIL": "nobody@nowhere",
    "GIT_COMMITTER_NAME": "nobody",
    "GIT_COMMITTER_EMAIL": "nobody@nowhere",
}


class Clone:
    """A clone of the project, as a user has it; its commands run with the Python of the tests.

    Attributes:
        root: Its folder.
        overrides: Given to every command of quantline.
    """

    def __init__(self, root: Path, overrides: list[str]) -> None:
        self.root = root
        self.overrides = overrides

    @classmethod
    def begin(cls, root: Path, overrides: list[str]) -> "Clone":
        """Copy the project's files into a repository of their own."""
        for name in FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, root / name)
        clone = cls(root, overrides)
        clone.run("git", "init", "--quiet", "--initial-branch=main")
        clone.commit("start")
        return clone

    def run(self, *command: str, expect: int = 0) -> str:
        """Run a command that has to end with the code `expect`; return what it prints."""
        python = str(Path(sys.executable).parent)
        environment = os.environ | IDENTITY
        environment |= {
            "PATH": os.pathsep.join([python, os.environ["PATH"]]),
            "PYTHONPATH": str(self.root),
            "COLUMNS": "200",
        }
        done = subprocess.run(
            command, cwd=self.root, capture_output=True, text=True, check=False, env=environment
        )
        printed = f"{done.stdout[-3000:]} {done.stderr[-3000:]}"
        assert done.returncode == expect, f"{command} ended with {done.returncode}: {printed}"
        return done.stdout + done.stderr

    def commit(self, message: str) -> None:
        """Commit everything."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "-m", message)

    def quantline(self, *command: str, expect: int = 0) -> str:
        """Run a command of quantline with the overrides."""
        module = [sys.executable, "-m", "quantline.cli"]
        return self.run(*module, *command, *self.overrides, expect=expect)

    def dvc(self, *arguments: str, expect: int = 0) -> str:
        """Run a command of DVC."""
        return self.run(sys.executable, "-m", "dvc", *arguments, expect=expect)

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the rows of the report by variant."""
        report = json.loads((self.root / "reports/compression.json").read_text())
        return {row["variant"]: row for row in report["variants"]}

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return the metrics of the variants."""
        return {name: row["metrics"] for name, row in self.report().items()}

    def finished(self) -> list[tuple[str, str | None]]:
        """Return (stage, instance) of every stage that has ended well so far."""
        stages = []
        for event in read_events(self.root):
            if event["reason_code"] == "stage_finished":
                stages.append((event["stage"], event["payload"]["instance"]))
        return stages
