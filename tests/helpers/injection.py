"""A stage in a forked child that is killed, or gets an error, at one of its file operations.

The child has everything imported already, so that a moment costs milliseconds. Operations are
counted by Python's audit hook before they happen: opening for writing, renaming, linking, removing,
making folders, changing modes; and fsync. What libraries in C and Rust write is cut off by a limit
on the size of files: with the signal's default action the process is killed in the middle of a
write, and with the signal ignored the write comes back short.
"""

import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models.forks import CALLERS, begin_fork
from quantline.run import child_process
from quantline.run.stage import StageRun, stage_run

RENAMING = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
STAGES = ("load", "calibrate", "reference", "quantize", "export", "evaluate", "compare")
NOT_OURS = ("events.jsonl", ".quantline", "answers")


@dataclass
class Outcome:
    """How a run of a stage has ended.

    Attributes:
        code: Of the process, negative for a signal.
        operations: Those on files that were counted, in order.
        parts: Blocks that were closed, by the name of their file.
        words: What it printed.
    """

    code: int
    operations: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    words: str = ""


@dataclass(frozen=True)
class Moment:
    """When and how a run is disturbed.

    Attributes:
        at: Number of the operation, from 0; None for no operation.
        error: The error that it gets; None for a kill.
        largest: Bytes that a file may have; None for any.
    """

    at: int | None = None
    error: int | None = None
    largest: int | None = None


def import_everything() -> None:
    """Import what the stages import while they run, so that no child has to."""
    for name in (
        "torch",
        "transformers",
        "quantline.calibration.collect",
        "quantline.report.page",
        "quantline.report.plots",
        "quantline.runtimes.smoke.smoke_test",
        "quantline.metrics.measure",
        "matplotlib.pyplot",
        "matplotlib.backends.backend_svg",
        "tqdm",
        *(f"stages.{stage}" for stage in STAGES),
    ):
        importlib.import_module(name)


def run_stage(
    root: Path,
    stage: str,
    instance: str | None,
    moment: Moment | None,
    prepare: Callable[[], None] | None = None,
) -> Outcome:
    """Run a stage in a project, in a forked child, which calls `prepare` before."""
    reading, record = os.pipe()  # no limit on the size of files holds for a pipe
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        try:
            if prepare is not None:
                prepare()
            os._exit(_in_child(root, stage, instance, moment or Moment(), record))
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    os.close(record)
    with os.fdopen(reading, errors="replace") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    outcome = Outcome(os.waitstatus_to_exitcode(status))
    for line in text.splitlines():
        kind, _, value = line.partition(" ")
        if kind == "OPERATION":
            outcome.operations.append(value)
        elif kind == "PART":
            outcome.parts.append(value)
        else:
            outcome.words += line + "\n"
    return outcome


def kill_after_calls(
    root: Path,
    stage: str,
    instance: str | None,
    owner: Any,
    name: str,
    count: int,
    counts: Callable[..., bool] = lambda *_: True,
) -> None:
    """Run a stage in a process that is killed when a function or method was called often enough.

    Args:
        root: The project.
        stage: The stage.
        instance: Its recipe or variant.
        owner: The class or module that has the function.
        name: The function's.
        count: After how many calls it is killed.
        counts: Which calls count, by their arguments.
    """
    original = getattr(owner, name)
    calls = 0

    def call_and_count(*arguments: Any) -> Any:
        nonlocal calls
        result = original(*arguments)
        calls += counts(*arguments)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    outcome = run_stage(root, stage, instance, None, lambda: setattr(owner, name, call_and_count))
    assert outcome.code == -signal.SIGKILL, outcome.words


def _in_child(root: Path, stage: str, instance: str | None, moment: Moment, descriptor: int) -> int:
    os.chdir(root)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    begin_fork()
    module = importlib.import_module(f"stages.{stage}")
    _replace_what_is_slow(module, root)
    _count(root, moment, descriptor)
    if moment.largest is not None:
        action = signal.SIG_IGN if moment.error else signal.SIG_DFL
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (moment.largest, moment.largest))
    try:
        with stage_run(stage, instance) as run:
            getattr(module, stage)(run)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def _replace_what_is_slow(module: Any, root: Path) -> None:
    """Do without MLflow, and measure once: what was measured then is the answer from then on."""
    StageRun.track = lambda *_, **__: ""  # type: ignore[assignment,method-assign]
    StageRun.track_failure = lambda *_: None  # type: ignore[method-assign]
    for name in ("log_comparison", "after_comparison"):
        if hasattr(module, name):
            setattr(module, name, lambda *_, **__: "")
    stored = root.parent / "answers"
    stored.mkdir(exist_ok=True)

    def answer(function: str, arguments: dict[str, Any], *_: object) -> dict[str, Any]:
        path = stored / f"{function.partition(':')[2]}-{Path(arguments['bundle']).name[:6]}.json"
        if not path.exists():
            from quantline.registry import load_object

            result = load_object(function)(**arguments)
            path.write_text(json.dumps(result))
        return json.loads(path.read_text())

    callers = map(importlib.import_module, CALLERS)
    for owner in (module, *callers, child_process):
        if hasattr(owner, "call_in_child"):
            owner.call_in_child = answer


def _count(root: Path, moment: Moment, descriptor: int) -> None:
    """Count operations on the project's files, and disturb the one that was asked for."""
    number = 0
    inside = str(root)
    busy = False

    def happens(name: str, path: object) -> None:
        nonlocal number, busy
        if busy:
            return
        if isinstance(path, int):
            shown = f"descriptor {path}"
        else:
            shown = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
            if not shown.startswith(inside):
                return
            shown = os.path.relpath(shown, inside)
        busy = True
        os.write(descriptor, f"OPERATION {name} {shown}\n".encode())
        busy = False
        here = number
        number += 1
        if here != moment.at:
            return
        if moment.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(moment.error, os.strerror(moment.error), shown)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if isinstance(path, str | bytes | os.PathLike) and writes:
                happens("open", path)
        elif event in RENAMING:
            happens(event, arguments[0])

    def counted_fsync(file: int) -> None:
        happens("fsync", file)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    _note_parts(descriptor)


def _note_parts(descriptor: int) -> None:
    """Note each block whose file is there."""
    from quantline.calibration.block_files import BlockWriter
    from quantline.quantized.store import QuantizedWriter

    close, close_part = BlockWriter.close, QuantizedWriter.close_part

    def noted(self: BlockWriter, block: int) -> None:
        close(self, block)
        os.write(descriptor, f"PART {self.kind}-{block}\n".encode())

    def noted_part(self: QuantizedWriter, part: str, report: dict[str, Any]) -> None:
        close_part(self, part, report)
        os.write(descriptor, f"PART {part}\n".encode())

    BlockWriter.close = noted  # type: ignore[method-assign]
    QuantizedWriter.close_part = noted_part  # type: ignore[method-assign]


def files_of(root: Path, *parts: str) -> dict[str, str]:
    """Return path → sha256 of what is in a project, besides its events; folders without one."""
    found = {}
    for path in sorted(root.joinpath(*parts).rglob("*")):
        name = path.relative_to(root).as_posix()
        if name.startswith(NOT_OURS):
            continue
        content = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[name] = content
    return found


@contextlib.contextmanager
def copy_of(project: Path, name: str) -> Iterator[Path]:
    """Yield a copy of a project, which shares the recorded answers with it."""
    root = project.parent / name
    shutil.copytree(project, root, symlinks=True)
    try:
        yield root
    finally:
        shutil.rmtree(root)
