"""Every journey in a process of its own, which may crash, hang or take too much memory.

The processes are forked from one that has imported and compiled everything. What ends a process is
the end of the step that it was at; the next process goes on with the next step.
"""

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.models.architectures import Architecture
from benchmarks.models.journey import Journey
from quantline.errors import Failure
from quantline.files import MIB, read_json
from quantline.methods import threads

MEMORY_MIB = 8192  # that a process may ask for
WARM = Architecture("llama", "AutoModelForCausalLM")
MOST_PROCESSES = 12  # for one architecture


def warm_up(template: Path) -> None:
    """Take a model through the stages here, so that forks have imported and compiled everything.

    Args:
        template: A project without a model.
    """
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as quiet:
        project = Path(folder) / "project"
        shutil.copytree(template, project)
        journey = Journey("warm-up", WARM, project, Path(folder) / "record.json")
        with redirect_stdout(quiet), redirect_stderr(quiet):
            journey.run()
        os.chdir(here)
    threads._pool.cache_clear()  # a fork has none of its threads


class Matrix:
    """The journeys of many architectures.

    Attributes:
        folder: Where the records and, while they are needed, the projects are.
    """

    def __init__(self, folder: Path, template: Path, seconds: float, key: str | None) -> None:
        """Take a place to work in.

        Args:
            folder: For the records.
            template: A project without a model.
            seconds: How long one process may take.
            key: What the results depend on; a record with another one counts for nothing. None
                lets all count.
        """
        self.folder = folder
        self.template = template
        self.seconds = seconds
        self.key = key
        self._context = get_context("fork")

    def record_file(self, name: str) -> Path:
        """Return the file with what has been found out about an architecture."""
        return self.folder / f"{name}.json"

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield what has been found out so far."""
        for file in sorted(self.folder.glob("*.json")):
            yield read_json(file)

    def known(self, name: str) -> dict[str, Any] | None:
        """Return the record of an architecture that has taken every step; forget a stale one."""
        file = self.record_file(name)
        if not file.is_file():
            return None
        record = read_json(file)
        if self.key is not None and record.get("key") != self.key:
            file.unlink()
            file.with_suffix(".log").unlink(missing_ok=True)
            return None
        return record if record.get("done") else None

    def run(self, name: str, architecture: Architecture) -> dict[str, Any]:
        """Take an architecture through all steps; return its record."""
        if record := self.known(name):
            return record
        project = self.folder / f"{name}.project"
        shutil.rmtree(project, ignore_errors=True)
        shutil.copytree(self.template, project)
        file = self.record_file(name)
        for _ in range(MOST_PROCESSES):
            arguments = (name, architecture, project, file, self.key)
            process = self._context.Process(target=_travel, args=arguments)
            started = time.monotonic()
            process.start()
            process.join(self.seconds)
            if process.exitcode is None:
                process.kill()
                process.join()
            if process.exitcode == 0:
                break
            seconds = time.monotonic() - started
            failure = Failure.RUNTIME_CRASHED
            message = f"its process ended with code {process.exitcode} after {seconds:.0f} s"
            if seconds >= self.seconds:
                failure = Failure.TIMED_OUT
            Journey(name, architecture, project, file).close_step_in_work(failure, message)
        shutil.rmtree(project, ignore_errors=True)
        return read_json(file)


def _travel(
    name: str, architecture: Architecture, project: Path, record: Path, key: str | None
) -> None:
    """Take an architecture through its steps, in a process of its own."""
    with open(record.with_suffix(".log"), "ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MIB * MIB, MEMORY_MIB * MIB))
    journey = Journey(name, architecture, project, record)
    journey.record["key"] = key
    journey.run()
