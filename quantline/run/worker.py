"""The process that `call_in_child` starts: it calls one function and writes what that returns.

python -m quantline.run.worker CALL ANSWER
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from quantline.errors import Failure, StageError, failure_of
from quantline.files import read_json, write_json
from quantline.registry import load_object

PR_SET_PDEATHSIG = 1  # of prctl: the signal that this process gets when its parent ends


def main(call: Path, answer: Path) -> None:
    """Call the function that `call` names, and write its answer or its failure."""
    # This process does not outlive the stage, however that ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        # Where the system runs out of memory, this process goes and not another.
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    request = read_json(call)
    try:
        function = cast(Callable[..., dict[str, Any]], load_object(request["function"]))
        result = function(**request["arguments"])
    except StageError as error:
        result = {"failure": error.failure, "message": str(error), "reason": error.reason}
    except Exception as error:
        failure = failure_of(error)
        if failure is Failure.INTERNAL_ERROR:
            raise
        result = {"failure": failure, "message": f"{type(error).__name__}: {error}"}
    write_json(answer, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
