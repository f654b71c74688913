"""DVC as a command that keeps what it refuses.

python -m quantline.run.dvc_program REFUSALS repro --keep-going

A stage that fails by itself writes a run event. What DVC refuses without running a stage, such as
an input that is gone or a lock that another DVC holds, would be in the terminal alone: it is
written to the file REFUSALS as JSON, a list of [stage or null, what DVC said].

DVC wants git unless it is told otherwise; in a tree without git it is told so for this call.
"""

import json
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

Refusal = tuple[str | None, str]
SYSTEM_CONFIG = "DVC_SYSTEM_CONFIG_DIR"
WARNINGS_ALONE = "--warnings-alone"
NO_GIT = "[core]\n    no_scm = true\n"


class KeepRefusals(logging.Handler):
    """Collects what DVC logs as errors, without those of stages that ran and failed."""

    def __init__(self) -> None:
        """Listen to warnings and errors."""
        super().__init__(logging.WARNING)
        self._errors: list[BaseException] = []  # of stages, in the order in which they failed
        self.refusals: list[Refusal] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record of DVC's logger."""
        from dvc.exceptions import ReproductionError

        arguments = record.args if isinstance(record.args, tuple) else ()
        if record.levelno < logging.ERROR:
            # With --keep-going, each stage's error is a warning.
            if arguments and isinstance(arguments[0], Exception):
                self._errors.append(arguments[0])
            return
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, KeyboardInterrupt):
            return
        if not isinstance(error, ReproductionError):
            said = dict.fromkeys([record.getMessage(), *_messages(error)])
            self.refusals.append((None, ": ".join(part for part in said if part)))
            return
        errors = self._errors or [error.__cause__ or error]
        names: list[str | None] = list(re.findall(r"'([^']+)'", str(error)))
        if len(names) != len(errors):
            names = [None] * len(errors)
        for name, cause in zip(names, errors, strict=True):
            if not _ran(cause):
                self.refusals.append((name, ": ".join(_messages(cause))))


def _ran(error: BaseException) -> bool:
    """Whether a stage's error is that its command has failed, which names it itself."""
    from dvc.stage.exceptions import StageCmdFailedError

    return isinstance(error, StageCmdFailedError)


def _messages(error: BaseException | None) -> list[str]:
    """Return the messages of an error and of what it was raised from."""
    messages = []
    while error is not None:
        messages.append(str(error) or type(error).__name__)
        error = error.__cause__
    return messages


def has_git(folder: Path) -> bool:
    """Whether a folder is in a git repository."""
    return any((parent / ".git").exists() for parent in (folder, *folder.parents))


def read_locks_plainly() -> None:
    """Have DVC read dvc.lock without what it keeps of comments, of which it writes none.

    It reads and writes the file after each stage. To read that of ten variants with comments in
    mind, in Python in place of C, takes 0.75 seconds in place of 0.1.
    """
    from dvc.dvcfile import LOCK_FILE
    from dvc.utils.serialize import _yaml

    keeping_comments = _yaml.parse_yaml_for_update

    def parse(text: str, path: str) -> Any:
        plain = Path(path).name == LOCK_FILE
        return _yaml.parse_yaml(text, path) if plain else keeping_comments(text, path)

    _yaml.parse_yaml_for_update = parse


def run(path: Path, arguments: list[str]) -> int:
    """Run a command of DVC, write what it refuses, and return its exit code.

    Args:
        path: Where to write that.
        arguments: DVC's; after WARNINGS_ALONE, it says nothing that is less than a warning. Its
            own --quiet would leave out what it refuses.
    """
    from dvc.cli import main

    if arguments[:1] == [WARNINGS_ALONE]:
        from dvc.ui import ui

        arguments = arguments[1:]
        ui.enable = lambda: None  # by which `main` would let it give advice
        for handler in logging.getLogger("dvc").handlers:
            handler.addFilter(lambda record: record.levelno >= logging.WARNING)
    read_locks_plainly()
    keep = KeepRefusals()
    logging.getLogger("dvc").addHandler(keep)
    try:
        return int(main(arguments))
    finally:
        path.write_text(json.dumps(keep.refusals), encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if not has_git(Path.cwd()):
            (Path(folder) / "config").write_text(NO_GIT, encoding="utf-8")
            os.environ[SYSTEM_CONFIG] = folder
        sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
