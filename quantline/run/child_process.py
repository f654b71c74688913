"""A part of a stage in a process of its own, with limits of time and memory: what brings it down is a named failure.

The stage calls `ask`, which starts `python -m <module> <arguments> --into <file>`; that process calls `answer`.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from quantline.config.params import Limits
from quantline.errors import Failure, Reason, StageError, failure_of
from quantline.files import write_json

POLL_S = 0.1  # between two looks at the memory
FAMILY_S = 1.0  # between two looks for processes that the process has started
MIB = 2**20
PR_SET_PDEATHSIG = 1
CRASH = "Fatal Python error"  # what faulthandler says first of a crash; then the frames, the innermost first


def ask(module: str, *arguments: str, limits: Limits, what: str, python: str | None = None) -> dict:
    """What a module of ours answers in a fresh process of `python` (default: this one). `what` names it in messages.

    Its memory is the resident memory of it and of all that it starts, pages of mapped files included. Address space is
    not limited, because runtimes map far more than they touch. When it ends, all that it has started ends with it.

    Raises StageError: its own failures, runtime_crashed, timed_out, out_of_memory, runtime_unavailable.
    """
    with tempfile.TemporaryDirectory() as work, (Path(work) / "stderr").open("w+b") as said:
        target = Path(work) / "answer.json"
        try:
            process = subprocess.Popen(
                [python or sys.executable, "-X", "faulthandler", "-m", module, *arguments, "--into", str(target)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
                env=_environment())
        except OSError as error:
            raise StageError(
                Failure.RUNTIME_UNAVAILABLE, f"expected a Python interpreter for {what}, and {python or sys.executable} does "
                                             f"not start: {error.strerror}; mend evaluation.pythons") from error
        try:
            _watch(process, limits, what)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode or not target.is_file():
            said.seek(0)
            raise _ended(process.returncode, said.read().decode(errors="replace"), what)
        found = json.loads(target.read_text(encoding="utf-8"))
    if "failure" in found:
        reason = found.get("reason")
        raise StageError(Failure(found["failure"]), found["message"], Reason(reason) if reason else None)
    return found


def _environment() -> dict[str, str]:
    """This process's, in which every interpreter finds the same `stages` as this one."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def answer(target: Path, work: Callable[[], dict]) -> None:
    """In the process that was started: write what `work` returns, or the failure that it ran into."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive the stage, however that ends
    with contextlib.suppress(OSError):  # where the system runs out of memory, this process goes and not another
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        found = work()
    except StageError as error:
        found = {"failure": error.failure, "message": str(error), "reason": error.reason}
    except Exception as error:
        failure = failure_of(error)
        if failure is Failure.INTERNAL_ERROR:
            raise
        found = {"failure": failure, "message": f"{type(error).__name__}: {error}"}
    write_json(target, found)


def _watch(process: subprocess.Popen, limits: Limits, what: str) -> None:
    """Wait for the process to end. Raises StageError: timed_out, out_of_memory; the process is then still there."""
    started = looked = time.monotonic()
    leader = psutil.Process(process.pid)
    family = [leader]
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return
        now = time.monotonic()
        if limits.seconds is not None and now - started > limits.seconds:
            raise StageError(Failure.TIMED_OUT, f"expected {what} to end within {limits.seconds:g} s, and it was still "
                             "running; raise evaluation.limits.seconds (null for no limit), or give it less to do")
        if limits.memory_mib is None:
            continue
        if now - looked > FAMILY_S:
            looked = now
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [leader, *leader.children(recursive=True)]
        resident = sum(map(_resident, family)) / MIB
        if resident > limits.memory_mib:
            raise StageError(Failure.OUT_OF_MEMORY, f"expected {what} to stay within {limits.memory_mib:g} MiB, found "
                             f"{resident:.0f} MiB after {now - started:.0f} s; raise evaluation.limits.memory_mib (null "
                             "for no limit), or take fewer or shorter sequences")


def _resident(process: psutil.Process) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _ended(code: int, said: str, what: str) -> StageError:
    """The failure of a process that ended without an answer, from its return code and what it wrote to stderr."""
    if code == -signal.SIGKILL:
        return StageError(Failure.OUT_OF_MEMORY, f"{what} was killed from outside, as the system does when it runs out of "
                                                 "memory; close other programs, or take fewer or shorter sequences")
    lines = [line for line in said.splitlines() if line.strip()]
    crash = next((lines[place:] for place, line in enumerate(lines) if line.startswith(CRASH)), [])
    where = [line.strip() for line in crash[1:] if line.startswith("  File ")][:1]
    told = "; ".join(crash[:1] + where or lines[-2:]) or "it said nothing"
    try:
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    except ValueError:
        how = f"signal {-code}"
    return StageError(Failure.RUNTIME_CRASHED, f"expected {what} to end well, and it ended with {how}: {told}; try the "
                                               "variant in another version of its runtime, or leave it out")
