"""`quantline repro --jobs`: recipes and exports side by side, each with a DVC of its own.

DVC lets several of its runs work in one project: each holds the project's lock only between its
stages. What runs here is what the serial run would do: recipes, and the exports of those that are
done. Evaluations are not among them, since each measures its variant's speed.
"""

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import IO, NamedTuple, cast

from quantline.cli.dvc import PROGRAM, refusals_of
from quantline.cli.program import python_first
from quantline.config.params import Params
from quantline.errors import ConfigError
from quantline.files import MIB
from quantline.messages import say
from quantline.run.dvc_program import WARNINGS_ALONE
from quantline.run.leash import leashed
from quantline.run.memory import available_bytes
from quantline.run.process_tree import end_tree
from quantline.run.project_lock import FOLDER

SHARED = ("check", "load", "answer", "calibrate", "reference")  # what all recipes and exports need
POLL_S = 0.5
PIECE_BYTES = 1 << 16  # of output that are read at once


class Task(NamedTuple):
    """A stage that can run beside others.

    Attributes:
        stage: As DVC calls it.
        after: The stage whose result it reads; None if that is there.
        memory: Bytes that it holds at most.
    """

    stage: str
    after: str | None
    memory: float


class Job(NamedTuple):
    """A task that runs."""

    task: Task
    process: "subprocess.Popen[bytes]"
    refusals: Path


def tasks_of(params: Params, changed: set[str], memory: dict[str, float]) -> list[Task]:
    """Return the recipes and exports that have to run, in the order of params.yaml.

    Args:
        params: What is configured.
        changed: Stages, as DVC calls them, that are not up to date by themselves.
        memory: Stage, with its recipe or variant → bytes that it holds at most.
    """
    tasks = []
    for recipe in params.recipes:
        stage = f"quantize@{recipe}"
        if stage in changed:
            tasks.append(Task(stage, None, memory.get(f"quantize {recipe}", 0.0)))
    rounding = {task.stage for task in tasks}
    for name, variant in params.variants.items():
        stage, after = f"export@{name}", f"quantize@{variant.recipe}"
        if after in rounding or stage in changed:
            needed = memory.get(f"export {name}", 0.0)
            tasks.append(Task(stage, after if after in rounding else None, needed))
    return tasks


class SideBySide:
    """Runs tasks, at most so many at once and within so much memory."""

    def __init__(self, tasks: list[Task], jobs: int, memory: float) -> None:
        """Take what has to run.

        Args:
            tasks: Each after the one whose result it reads.
            jobs: How many run at once.
            memory: Bytes that they may hold together. One that needs more than that runs alone.
        """
        self._waiting = list(tasks)
        self._jobs = jobs
        self._memory = memory
        self._running: list[Job] = []
        self._lines = selectors.DefaultSelector()
        self._begun: dict[IO[bytes], bytes] = {}  # lines that are not there to their ends
        self.failed: set[str] = set()
        self.refused: list[str] = []

    def run(self) -> None:
        """Run all tasks; those whose source has failed are left out, and have failed too."""
        try:
            while self._waiting or self._running:
                while (task := self._next()) is not None:
                    self._waiting.remove(task)
                    self._start(task)
                self._pass_on()
                for job in [job for job in self._running if job.process.poll() is not None]:
                    self._end(job)
        finally:
            for job in self._running:
                end_tree(job.process)
            self._lines.close()

    def _next(self) -> Task | None:
        """Return a task that may start now, if there is one."""
        for task in [task for task in self._waiting if task.after in self.failed]:
            self._waiting.remove(task)
            self.failed.add(task.stage)
        held = sum(job.task.memory for job in self._running)
        if len(self._running) >= self._jobs:
            return None
        undone = {task.stage for task in (*self._waiting, *(job.task for job in self._running))}
        for task in self._waiting:
            fits = not self._running or held + task.memory <= self._memory
            if task.after not in undone and fits:
                return task
        return None

    def _start(self, task: Task) -> None:
        refusals = FOLDER / f"refusals-{task.stage}.json"
        refusals.unlink(missing_ok=True)
        command = [sys.executable, "-m", PROGRAM, str(refusals), WARNINGS_ALONE]
        process = subprocess.Popen(
            [*command, "--wait-for-lock", "repro", "--single-item", task.stage],
            env=python_first(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=leashed(),  # noqa: PLW1509  the commands have one thread
        )
        for output in _outputs(process):
            os.set_blocking(output.fileno(), False)
            self._lines.register(output, selectors.EVENT_READ, output is process.stderr)
        self._running.append(Job(task, process, refusals))

    def _pass_on(self) -> None:
        """Say what the stages say, whole lines at a time; wait for it for POLL_S at most."""
        for key, _ in self._lines.select(POLL_S):
            self._read(cast(IO[bytes], key.fileobj), is_error=key.data)

    def _read(self, output: IO[bytes], is_error: bool) -> None:
        """Say the lines that are there."""
        while data := output.read(PIECE_BYTES):
            *lines, rest = (self._begun.pop(output, b"") + data).split(b"\n")
            self._begun[output] = rest
            for line in lines:
                _say(line, is_error)
        if data is not None:  # the end; nothing yet is None
            self._lines.unregister(output)
            _say(self._begun.pop(output, b""), is_error)

    def _end(self, job: Job) -> None:
        """Take note of how a job has ended."""
        for output in _outputs(job.process):
            if output in self._lines.get_map():
                self._read(output, is_error=output is job.process.stderr)
            if output in self._lines.get_map():  # something that it has started lives on
                self._lines.unregister(output)
            output.close()
        self._running.remove(job)
        code = job.process.returncode
        if code:
            self.failed.add(job.task.stage)
            self.refused += refusals_of(job.refusals, code)
        job.refusals.unlink(missing_ok=True)


def _outputs(process: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes]]:
    """Return what a process says and what it complains of."""
    return cast(IO[bytes], process.stdout), cast(IO[bytes], process.stderr)


def _say(line: bytes, is_error: bool) -> None:
    """Say a line, unless it is empty."""
    if line.strip():
        say(line.decode(errors="replace"), error=is_error)


def changed_stages(names: list[str]) -> set[str]:
    """Return which of some stages DVC finds not up to date; all of them if it cannot say.

    What keeps DVC from saying is an error of the run that follows, which names it.
    """
    refusals = FOLDER / "refusals-status.json"
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, str(refusals), "status", "--json", *names],
        env=python_first(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    refusals.unlink(missing_ok=True)
    if done.returncode:
        return set(names)
    return set(json.loads(done.stdout))


def run_side_by_side(params: Params, jobs: int, memory_gib: float | None) -> SideBySide:
    """Run the recipes and exports that are not up to date, several at once.

    The stages that they all need have run.

    Args:
        params: What is configured.
        jobs: How many at once.
        memory_gib: That they may hold together; by default four fifths of what is free.

    Raises:
        ConfigError: If the model's size cannot be read.
    """
    from quantline.doctor.needs import memory_of_stages
    from quantline.doctor.sizes import sizes_of_project

    sizes = sizes_of_project(params, Path.cwd())
    if sizes is None:
        raise ConfigError(
            "expected a model whose size can be read, to know how many stages fit into memory, "
            "found none; leave out --jobs"
        )
    names = [f"quantize@{name}" for name in params.recipes]
    names += [f"export@{name}" for name in params.variants]
    tasks = tasks_of(params, changed_stages(names), memory_of_stages(params, sizes))
    budget = 0.8 * available_bytes()
    if memory_gib is not None:
        budget = memory_gib * 1024 * MIB
    run = SideBySide(tasks, jobs, budget)
    if tasks:
        say(
            f"side by side: {len(tasks)} stages, at most {jobs} at once and "
            f"{budget / MIB:,.0f} MiB; then the evaluations, one after the other"
        )
        run.run()
    return run
