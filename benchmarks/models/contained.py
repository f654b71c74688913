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
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.models.architectures import Architecture
from benchmarks.models.journey import Journey
from quantline.errors import Failure
from quantline.files import MIB, read_json, write_json
from quantline.methods import threads
from quantline.run.leash import end_with_parent

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

    def __init__(
        self, folder: Path, template: Path, seconds: float, key: str, keep: bool = False
    ) -> None:
        """Take a place to work in.

        Args:
            folder: For the records.
            template: A project without a model.
            seconds: How long one process may take.
            key: What the results depend on.
            keep: Whether a record with another key counts.
        """
        self.folder = folder
        self.template = template
        self.seconds = seconds
        self.key = key
        self.keep = keep

    def record_file(self, name: str) -> Path:
        """Return the file with what has been found out about an architecture."""
        return self.folder / f"{name}.json"

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield what has been found out so far."""
        for file in sorted(self.folder.glob("*.json")):
            yield read_json(file)

    def known(self, name: str, variants: Iterable[str]) -> dict[str, Any] | None:
        """Return the record of an architecture whose variants were tried; forget a stale one."""
        file = self.record_file(name)
        if not file.is_file():
            return None
        record = read_json(file)
        if not self.keep and record.get("key") != self.key:
            file.unlink()
            file.with_suffix(".log").unlink(missing_ok=True)
            return None
        return record if {*variants} <= {*record.get("tried", ())} else None

    def run(
        self, chosen: dict[str, Architecture], variants: tuple[str, ...], workers: int
    ) -> Iterator[dict[str, Any]]:
        """Take architectures through the steps to some variants; yield their records.

        Args:
            chosen: Name → architecture.
            variants: To export and evaluate.
            workers: How many processes at once.
        """
        waiting = []
        for name, architecture in chosen.items():
            if record := self.known(name, variants):
                yield record
            else:
                waiting.append(_Travel(self, name, architecture, variants))
        working: list[_Travel] = []
        while waiting or working:
            while waiting and len(working) < workers:
                travel = waiting.pop(0)
                travel.begin()
                working.append(travel)
            wait([travel.process.sentinel for travel in working], timeout=1)
            for travel in list(working):
                if travel.has_ended():
                    working.remove(travel)
                    yield read_json(travel.file)


class _Travel:
    """One journey, in one process after another.

    Attributes:
        file: Its record.
        process: The present one.
    """

    def __init__(
        self, matrix: Matrix, name: str, architecture: Architecture, variants: tuple[str, ...]
    ) -> None:
        self.matrix = matrix
        self.name = name
        self.architecture = architecture
        self.variants = variants
        self.file = matrix.record_file(name)
        self.project = matrix.folder / f"{name}.project"
        self.processes = 0

    def _journey(self) -> Journey:
        return Journey(self.name, self.architecture, self.project, self.file)

    def begin(self) -> None:
        """Make a project, and start."""
        shutil.rmtree(self.project, ignore_errors=True)
        shutil.copytree(self.matrix.template, self.project)
        journey = self._journey()
        journey.forget(self.variants)
        journey.record["key"] = self.matrix.key
        write_json(self.file, journey.record)
        self._start()

    def _start(self) -> None:
        self.processes += 1
        self.started = time.monotonic()
        arguments = (self._journey(), self.variants, os.getpid())
        self.process = get_context("fork").Process(target=_go_on, args=arguments)
        self.process.start()

    def has_ended(self) -> bool:
        """Whether all steps are taken; a process that was brought down is followed by another."""
        seconds = time.monotonic() - self.started
        is_late = seconds >= self.matrix.seconds
        if self.process.exitcode is None and not is_late:
            return False
        if self.process.exitcode is None:
            self.process.kill()
        self.process.join()
        if self.process.exitcode != 0:
            failure = Failure.TIMED_OUT if is_late else Failure.RUNTIME_CRASHED
            code = self.process.exitcode
            message = f"its process ended with code {code} after {seconds:.0f} s"
            self._journey().close_step_in_work(failure, message)
            if self.processes < MOST_PROCESSES:
                self._start()
                return False
        shutil.rmtree(self.project, ignore_errors=True)
        return True


def _go_on(journey: Journey, variants: tuple[str, ...], parent: int) -> None:
    """Take the steps that are left, in a process of its own."""
    end_with_parent(parent)
    with open(journey.file.with_suffix(".log"), "ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MIB * MIB, MEMORY_MIB * MIB))
    journey.run(variants)
