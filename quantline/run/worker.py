"""The process that `call_in_child` starts: it calls one function and writes what that returns.

python -m quantline.run.worker CALL ANSWER PARENT

It calls the function in a child of its own, and watches over that: when the stage ends, however it
does, the child and all that it has started end with it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json
from quantline.registry import load_object
from quantline.run.answers import failure_answer
from quantline.run.leash import call_with_children, end_group, end_with_parent


def main(call: Path, answer: Path) -> None:
    """Call the function that `call` names, and write its answer or its failure."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    request = read_json(call)
    try:
        function = cast(Callable[..., dict[str, Any]], load_object(request["function"]))
        result = function(**request["arguments"])
    except BaseException as error:  # a panic of a library in Rust is no Exception
        result = failure_answer(error)
        if result["failure"] is Failure.INTERNAL_ERROR and not isinstance(error, StageError):
            raise
    write_json(answer, result)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_group)
    end_with_parent(int(sys.argv[3]), signal.SIGTERM)
    with contextlib.suppress(OSError):
        # Where the system runs out of memory, this process goes and not another.
        Path("/proc/self/oom_score_adj").write_text("1000")
    call_with_children(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
