"""Calling a function in a process of its own, with limits of time and memory.

What brings that process down is a named failure, and nothing of it stays. `call_in_child` starts
`python -m quantline.run.worker <call> <answer> <pid>`, which imports the function, calls it with
JSON arguments, and writes its JSON answer.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import psutil

from quantline.causes import failure_of, raise_if_of_machine
from quantline.config.texts import Limits
from quantline.errors import Failure, StageError
from quantline.files import MIB, read_json, write_json
from quantline.run.answers import result_of
from quantline.run.progress import FILE as PROGRESS
from quantline.run.progress import Follower

PACKAGE = Path(__file__).resolve().parents[1]
POLL_S = 0.1  # between two looks at the memory
TREE_POLL_S = 1.0  # between two looks for processes that the process has started
TAIL_BYTES = 1 << 18  # of stderr that are kept
CLOSE_S = 5.0  # to wait for the end of stderr, once the process has ended
CRASH = "Fatal Python error"  # what faulthandler writes first; then the frames, innermost first


def call_in_child(
    function: str,
    arguments: dict[str, Any],
    limits: Limits,
    label: str,
    python: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Call a function in a fresh process.

    Memory is the resident memory of the process and of all that it starts, pages of mapped files
    included. Address space is not limited, because runtimes map far more than they touch. When the
    process ends, all that it has started ends with it.

    Args:
        function: "module:name" of a function that takes keyword arguments and returns a dict.
        arguments: Its arguments, as JSON.
        limits: Of time and memory.
        label: What messages call the process.
        python: The interpreter; by default this one.
        variables: Of its environment, in place of this process's.

    Raises:
        StageError: What the function raises; runtime_crashed, timed_out, out_of_memory,
            runtime_unavailable.
    """
    python = python or sys.executable
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call.json"
        answer = Path(folder) / "answer.json"
        write_json(call, {"function": function, "arguments": arguments})
        told = Path(folder) / "progress.json"
        follower = Follower(told, label.removeprefix("the "))
        command = [python, "-X", "faulthandler", "-m", "quantline.run.worker"]
        try:
            ended = run_watched(
                [*command, str(call), str(answer), str(os.getpid())],
                limits,
                label,
                follower.look,
                env=_environment(Path(folder), python)
                | {PROGRESS: str(told)}
                | dict(variables or {}),
            )
        except OSError as error:
            if not isinstance(error, PermissionError):  # of a file that is no program
                raise_if_of_machine(error)
            raise StageError(
                Failure.RUNTIME_UNAVAILABLE,
                f"expected a Python interpreter for {label}, and {python} does not start: "
                f"{error.strerror}; mend evaluation.pythons",
            ) from error
        finally:
            follower.close()
        if ended.code or not answer.is_file():
            raise _crash(ended, label)
        return result_of(read_json(answer))


class Ended(NamedTuple):
    """How a process has ended.

    Attributes:
        code: Its return code; negative for a signal.
        errors: The end of what it wrote to stderr.
    """

    code: int
    errors: str


def run_watched(
    command: list[str],
    limits: Limits,
    label: str,
    look: Callable[[], None] | None = None,
    **options: Any,
) -> Ended:
    """Run a command in a session of its own, within limits, and wait for its end.

    Of what it says the end of stderr is kept, however much there is. All that it has started ends
    with it.

    Args:
        command: The program and its arguments.
        limits: Of time and memory.
        label: What messages call the process.
        look: Called again and again while the process runs.
        **options: For Popen.

    Raises:
        OSError: If the program does not start.
        StageError: timed_out, out_of_memory.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )
    errors = _Tail(cast(IO[bytes], process.stderr))
    try:
        _watch(process, limits, label, look or _nothing)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ended(process.returncode, errors.text())


class _Tail(threading.Thread):
    """Reads a pipe to its end, and keeps the last bytes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._bytes = b""
        self.start()

    def run(self) -> None:
        with self._pipe as pipe:
            while chunk := pipe.read1(TAIL_BYTES):  # type: ignore[attr-defined]
                self._bytes = (self._bytes + chunk)[-TAIL_BYTES:]

    def text(self) -> str:
        """Return what was read, once the pipe is closed."""
        self.join(CLOSE_S)  # whoever still holds it open is in a session of its own
        return self._bytes.decode(errors="replace")


def _environment(folder: Path, python: str) -> dict[str, str]:
    """Return this process's environment, in which the interpreter finds this very quantline.

    An interpreter of another environment gets PYTHONPATH with only a symlink to the package, so
    that it does not import our site-packages.
    """
    root = PACKAGE.parent
    if python != sys.executable:
        root = folder / "path"
        root.mkdir()
        (root / PACKAGE.name).symlink_to(PACKAGE)
    paths = [str(root), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _nothing() -> None:
    """Look at nothing."""


def _watch(
    process: subprocess.Popen[bytes], limits: Limits, label: str, look: Callable[[], None]
) -> None:
    """Wait for the process to end; call `look` again and again meanwhile.

    Raises:
        StageError: timed_out, out_of_memory; the process is then still running.
    """
    started = time.monotonic()
    looked = started
    leader = psutil.Process(process.pid)
    process_tree = [leader]
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return
        look()
        now = time.monotonic()
        if limits.seconds is not None and now - started > limits.seconds:
            raise StageError(
                Failure.TIMED_OUT,
                f"expected {label} to end within {limits.seconds:g} s, and it was still running; "
                "raise evaluation.limits.seconds (null for no limit), or give it less to do",
            )
        if limits.memory_mib is None:
            continue
        if now - looked > TREE_POLL_S:
            looked = now
            with contextlib.suppress(psutil.NoSuchProcess):
                process_tree = [leader, *leader.children(recursive=True)]
        resident = sum(_resident_bytes(member) for member in process_tree) / MIB
        if resident > limits.memory_mib:
            raise StageError(
                Failure.OUT_OF_MEMORY,
                f"expected {label} to stay within {limits.memory_mib:g} MiB, found "
                f"{resident:.0f} MiB after {now - started:.0f} s; raise "
                "evaluation.limits.memory_mib (null for no limit), or take fewer or shorter "
                "sequences",
            )


def _resident_bytes(process: psutil.Process) -> int:
    """Return a process's resident memory; 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _crash(ended: Ended, label: str) -> StageError:
    """Name the failure of a process that ended without an answer.

    Args:
        ended: How it ended.
        label: What messages call it.
    """
    code, errors = ended
    if code == -signal.SIGKILL:
        return StageError(
            Failure.OUT_OF_MEMORY,
            f"{label} was killed from outside, as the system does when it runs out of memory; "
            "close other programs, or take fewer or shorter sequences",
        )
    lines = [line for line in errors.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith(CRASH)]
    if starts:
        crash = lines[starts[0] :]
        frames = [line.strip() for line in crash[1:] if line.startswith("  File ")]
        quoted = crash[:1] + frames[:1]
    else:
        quoted = lines[-2:]
    if code < 0:
        names = {int(number): number.name for number in signal.Signals}
        how = f"signal {-code} ({names[-code]})" if -code in names else f"signal {-code}"
    else:
        how = f"exit code {code}"
    failure = failure_of(RuntimeError("; ".join(quoted))) if code > 0 else Failure.INTERNAL_ERROR
    return StageError(
        Failure.RUNTIME_CRASHED if failure is Failure.INTERNAL_ERROR else failure,
        f"expected {label} to end well, and it ended with {how}: "
        f"{'; '.join(quoted) or 'it wrote no error'}; try the variant in another version of its "
        "runtime, or leave it out",
    )
