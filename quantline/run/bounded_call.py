"""Calling code that strangers wrote (a template, a regular expression) within time and memory.

Nothing inside a process bounds such code: `9**(9**9)` in a template is one operation, and a regular
expression gives no other thread a chance. So it runs in a copy of this process, which costs
milliseconds to make, is kept for the next call, and can be killed.
"""

import contextlib
import os
import re
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

import psutil

from quantline.errors import Failure, StageError
from quantline.files import MIB
from quantline.run.leash import end_with_parent

SECONDS = 20.0
MEMORY_MIB = 1024  # more than this process has


class BoundedCall:
    """A function that is called in a copy of this process.

    Arguments and result have to be what pickle takes. The copy does not see what changes here after
    the first call.
    """

    def __init__(self, function: Callable[..., Any], what: str) -> None:
        """Start nothing yet.

        Args:
            function: To call.
            what: What runs, for messages, such as "the chat template".
        """
        self._function = function
        self._what = what
        self._pid = 0
        self._owner = 0
        self._pipe: Connection | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the function.

        Raises:
            StageError: What the function raises; timed_out, out_of_memory, runtime_crashed.
        """
        pipe = self._pipe
        if pipe is None or self._owner != os.getpid():  # a copy of this process has its own
            pipe = self._start()
        try:
            pipe.send(arguments)
            if not pipe.poll(SECONDS):
                raise StageError(
                    Failure.TIMED_OUT,
                    f"expected {self._what} to end within {SECONDS:g} s, and it was still running; "
                    "it does more than a model needs: take another one",
                )
            kind, value = pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._end()
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected {self._what} to end well, and its process was killed ({error!r}); take "
                "another one",
            ) from None
        except BaseException:
            self._end()
            raise
        if kind == "value":
            return value
        if kind == "memory":
            self._end()
            raise StageError(
                Failure.OUT_OF_MEMORY,
                f"expected {self._what} to stay within {MEMORY_MIB} MiB, and it did not; it does "
                "more than a model needs: take another one",
            )
        raise value if kind == "error" else StageError(*value)

    def _start(self) -> Connection:
        here, there = Pipe()
        self._owner = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            here.close()
            self._serve(there)
        there.close()
        self._pipe = here
        return here

    def _end(self) -> None:
        """End the copy; the next call makes another."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _serve(self, pipe: Connection) -> None:
        """Answer calls until the pipe closes; never return."""
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
            end_with_parent(self._owner)
            limit = psutil.Process().memory_info().vms + MEMORY_MIB * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            while True:
                pipe.send(self._answer(pipe.recv()))
        finally:
            os._exit(1)

    def _answer(self, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        try:
            return "value", self._function(*arguments)
        except StageError as error:
            return "named", (error.failure, str(error), error.reason)
        except MemoryError:
            return "memory", None
        except Exception as error:
            return "error", RuntimeError(f"{type(error).__name__}: {error}")


def _search(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def _match(pattern: str, text: str) -> bool:
    return re.match(pattern, text) is not None


# Whether a regular expression that somebody else wrote is in a text, or begins it.
pattern_in = BoundedCall(_search, "a regular expression")
pattern_begins = BoundedCall(_match, "a regular expression")
