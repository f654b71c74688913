"""The pages of the documentation, and the code blocks and commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.helpers.project import ROOT

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WORKFLOWS = sorted((ROOT / ".github").glob("[we]*/*.yml"))


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
        language: The first word of its info string.
        options: What follows that word, without spaces around it.
        code: Its lines.
    """

    language: str
    options: str
    code: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(language, options.strip(), code) for language, options, code in found]


def shell_lines(page: Path) -> list[str]:
    """Return the lines of a page's shell blocks, those that end in a backslash joined."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "sh":
            lines += re.sub(r"\\\n\s*", "", block.code).splitlines()
    return lines


def workflow_lines(path: Path) -> list[str]:
    """Return the commands that a workflow runs."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    lines: list[str] = []
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            lines += step.get("run", "").splitlines()
    return lines


def words_of(line: str) -> list[list[str]]:
    """Return the words of each command of a shell line; commands are separated by &&."""
    commands: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def commands_called(program: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (page, arguments) of every call of a program in the pages and the workflows."""
    calls = []
    for path in PAGES:
        calls += [(path, line) for line in shell_lines(path)]
    for path in WORKFLOWS:
        calls += [(path, line) for line in workflow_lines(path)]
    found = []
    for path, line in calls:
        for words in words_of(line):
            if Path(words[0]).name == program:
                found.append((path.name, tuple(words[1:])))
    return found
