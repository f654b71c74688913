"""Forks in place of the fresh processes in which stages try and measure a bundle.

A fresh process imports for seconds what a fork has already. What native code brings down is a fork
here too, and is named in the same way. Tests that are not about the process use them too.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json
from quantline.methods import threads
from quantline.run import worker
from quantline.run.child_process import result_of

CALLERS = ("stages.smoke", "quantline.metrics.measuring_process")  # modules with a name for it
LONGEST = 240  # seconds


@contextmanager
def forks_for_processes() -> Iterator[None]:
    """Let the stages call functions in forks, in this block."""
    with ExitStack() as patches:
        for module in CALLERS:
            patches.enter_context(mock.patch(f"{module}.call_in_child", call_in_fork))
        yield


def call_in_fork(
    function: str,
    arguments: dict[str, Any],
    limits: Any,
    label: str,
    python: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Do what quantline/run/child_process.py does, with LONGEST in place of the limits.

    The environment stays as it is: a fork's libraries have read theirs.

    Raises:
        StageError: What the function raises; timed_out, runtime_crashed.
    """
    assert python is None, "a fork has no other interpreter"
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call.json"
        answer = Path(folder) / "answer.json"
        write_json(call, {"function": function, "arguments": arguments})
        child = os.fork()
        if not child:
            _answer(call, answer)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGALRM:
            raise StageError(
                Failure.TIMED_OUT, f"expected {label} to end within {LONGEST} s, and it went on"
            )
        if code:
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected {label} to end well, and it ended with code {code}",
            )
        return result_of(read_json(answer))


def begin_fork() -> None:
    """Compute with one thread from here on, in a fork, and end it if it hangs.

    Threads stay in the parent. OpenMP's would be waited for, for ever, if the parent has had some.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST)
    threads._pool.cache_clear()
    os.cpu_count = lambda: 1  # what llama.cpp and onnxruntime go by
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.set_num_threads = lambda _: None


def _answer(call: Path, answer: Path) -> None:
    """Answer a call and end this process."""
    code = 1
    try:
        begin_fork()
        worker.main(call, answer)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        # As quantline/run/child_process.py quotes what a process wrote last.
        said = f"expected it to end well, and it ended with {type(error).__name__}: {error}"
        write_json(answer, {"failure": Failure.RUNTIME_CRASHED, "message": said})
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
