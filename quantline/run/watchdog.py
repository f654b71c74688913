"""Bounds of a stage as a whole, and its end when what has started it is gone.

A thread looks once a second. What it finds ends the stage as a request to end does, so that it
tidies up; a stage that does not react is ended by force, with its failure's name written first.
Code that never lets a thread of Python run is ended by the timer of `faulthandler`, which says in
which line it was.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from quantline.config.params import StageLimits
from quantline.errors import Failure, StageError
from quantline.files import MIB
from quantline.run.leash import is_running
from quantline.run.project_lock import holder_pid
from quantline.run.signals import AGAIN

POLL_S = 1.0  # between two looks
GRACE_S = 20.0  # for a stage to react
SHELLS = ("sh", "dash", "bash", "zsh", "fish", "ksh")
STDERR = 2


class Watchdog(threading.Thread):
    """Watches over the stage that the main thread runs.

    Attributes:
        breach: Why it has ended the stage; None if it has not.
    """

    def __init__(self, limits: StageLimits, at_last: Callable[[StageError], None]) -> None:
        """Start the clock.

        Args:
            limits: Of the stage.
            at_last: Called before a stage that does not react is ended by force.
        """
        super().__init__(daemon=True)
        self.breach: StageError | None = None
        self._limits = limits
        self._at_last = at_last
        self._since = time.monotonic()
        self._starters = _starters()
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until the stage has ended."""
        while not self._ended.wait(POLL_S):
            self.breach = self._look()
            if self.breach is not None:
                os.kill(os.getpid(), signal.SIGTERM)
                if not self._ended.wait(GRACE_S):
                    self._end_by_force(self.breach)
                return

    def end(self) -> None:
        """Look no more: the stage has ended."""
        self._ended.set()

    def _look(self) -> StageError | None:
        limits = self._limits
        seconds = time.monotonic() - self._since
        if limits.seconds is not None and seconds > limits.seconds:
            return StageError(
                Failure.TIMED_OUT,
                f"expected the stage to end within {limits.seconds:g} s, and it was still running; "
                "raise limits.seconds (null for no limit), or give it less to do",
            )
        if limits.memory_mib is not None:
            resident = _resident_bytes() / MIB
            if resident > limits.memory_mib:
                return StageError(
                    Failure.OUT_OF_MEMORY,
                    f"expected the stage to stay within {limits.memory_mib:g} MiB, found "
                    f"{resident:.0f} MiB after {seconds:.0f} s; raise limits.memory_mib (null for "
                    "no limit), or take fewer or shorter sequences",
                )
        for starter in self._starters:
            if not is_running(starter):
                return StageError(
                    Failure.INTERRUPTED,
                    f"what had started the stage (process {starter.pid}) was killed; {AGAIN}",
                )
        return None

    def _end_by_force(self, breach: StageError) -> None:
        try:
            self._at_last(breach)
        finally:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            os._exit(1)


@contextlib.contextmanager
def watched(limits: StageLimits, at_last: Callable[[StageError], None]) -> Iterator[Watchdog]:
    """Watch over the block; arguments are as for Watchdog.

    What the block does in a thread other than the main one is not bounded.
    """
    watchdog = Watchdog(limits, at_last)
    if threading.current_thread() is not threading.main_thread():
        yield watchdog
        return
    watchdog.start()
    if limits.seconds is not None:
        faulthandler.dump_traceback_later(limits.seconds + 2 * GRACE_S, exit=True, file=STDERR)
    try:
        yield watchdog
    finally:
        faulthandler.cancel_dump_traceback_later()
        watchdog.end()


def _resident_bytes() -> int:
    """Return the resident memory of this process and of all that it has started."""
    this = psutil.Process()
    size = this.memory_info().rss
    for child in this.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            size += child.memory_info().rss
    return size


def _starters() -> list[psutil.Process]:
    """Return the processes without which nobody waits for this stage: `quantline repro`, and DVC.

    A stage that a user started by hand may outlive the shell.
    """
    starters = []
    holder = holder_pid()
    with contextlib.suppress(psutil.NoSuchProcess):
        if holder is not None and holder != os.getpid():
            starters.append(psutil.Process(holder))
        if "DVC_STAGE" in os.environ:  # DVC calls a shell
            parent = psutil.Process().parent()
            if parent is not None and parent.name() in SHELLS:
                parent = parent.parent()
            if parent is not None and parent.pid > 1:
                starters.append(parent)
    return starters
