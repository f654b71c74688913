"""Child processes that are forked from the tests', and so have everything imported already.

What a stage computes in a fresh interpreter (quantline/run/child_process.py) takes seconds, nearly
all of which go into imports. Where a test is not about the process, a fork gives the same answer.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.files import read_json, write_json
from quantline.methods import threads
from quantline.run import worker
from quantline.run.child_process import Limits, result_of

LONGEST = 300  # seconds of a fork
CALLERS = ("stages.smoke", "quantline.metrics.measuring_process")  # modules that have a name for it


def fork_children(patch: Any) -> None:
    """Let the stages call functions in forks until a MonkeyPatch is undone."""
    for module in CALLERS:
        patch.setattr(f"{module}.call_in_child", call_in_fork)


def call_in_fork(
    function: str,
    arguments: dict[str, Any],
    limits: Limits,
    label: str,
    python: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Do what `call_in_child` does, without limits and variables, in a fork of this process."""
    assert python is None, "a fork has no other interpreter"
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder) / "call.json", Path(folder) / "answer.json"
        write_json(call, {"function": function, "arguments": arguments})
        child = os.fork()
        if not child:
            _answer(call, answer)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code == 0, f"the fork for {label} ended with {code}"
        return result_of(read_json(answer))


def begin_fork() -> None:
    """Compute with one thread from here on, in a fork, and end it if it hangs.

    Threads stay in the parent. OpenMP's would be waited for, for ever, if the parent has had some.
    """
    signal.alarm(LONGEST)
    threads._pool.cache_clear()
    os.cpu_count = lambda: 1  # what llama.cpp and onnxruntime go by
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.set_num_threads = lambda _: None


def _answer(call: Path, answer: Path) -> None:
    """Answer a call and end this process."""
    try:
        begin_fork()
        worker.main(call, answer)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)
