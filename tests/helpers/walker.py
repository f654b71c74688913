"""Somebody who types what a page of the documentation says."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.clone import IDENTITY
from tests.helpers.docs import blocks
from tests.helpers.project import ROOT

# In place of an installation of minutes: the environment of the tests, linked.
MAKE = "make .venv/.installed"
LINK = f"mkdir .venv && ln -s {sys.prefix}/* .venv/ && touch .venv/.installed"


def make_origin(folder: Path) -> Path:
    """Make a bare repository of the project's files as they are now, and return it."""
    git = ["git", "--git-dir", str(folder), "--work-tree", str(ROOT)]
    environment = os.environ | IDENTITY
    subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(folder)], check=True)
    subprocess.run([*git, "add", "--all"], check=True, cwd=ROOT)
    commit = ["commit", "--quiet", "-m", "start"]
    subprocess.run([*git, *commit], check=True, cwd=ROOT, env=environment)
    return folder


class Walker:
    """Types the shell blocks of a page, in their order or by what is in them.

    Attributes:
        folder: Where the next block is typed.
        page: The page.
    """

    def __init__(self, folder: Path, page: str) -> None:
        """Begin in a folder, with a page of docs/."""
        self.folder = folder
        self.page = page
        self._code = [one.code for one in blocks(ROOT / "docs" / page) if one.language == "sh"]

    def block(self, mark: str) -> str:
        """Return the only block that has some words in it."""
        (code,) = [code for code in self._code if mark in code]
        return code

    def line(self, mark: str) -> str:
        """Return the only line of the blocks that has some words in it."""
        (line,) = [line for code in self._code for line in code.splitlines() if mark in line]
        return line

    def types(self, code: str, replaced: dict[str, str] | None = None, expect: int = 0) -> str:
        """Run what the page has, in bash; return what it prints.

        Args:
            code: Of the page.
            replaced: Words of it → what this user writes there.
            expect: The exit code.
        """
        for words, own in (replaced or {}).items():
            assert words in code, f"{self.page} does not say {words!r} here any more"
            code = code.replace(words, own)
        environment = os.environ | IDENTITY | {"COLUMNS": "200"}
        # The environment is linked, and has a copy of the code of its own: that of the folder comes
        # before it, whichever a line has gone to.
        environment["PYTHONPATH"] = "."
        environment["PATH"] = os.pathsep.join([f"{sys.prefix}/bin", os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        printed = done.stdout + done.stderr
        ended = f"{code}\nended with {done.returncode}: {printed[-5000:]}"
        assert done.returncode == expect, ended
        return printed
