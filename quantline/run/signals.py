"""Requests to end: SIGTERM, as a scheduler sends it, and SIGHUP, when a terminal closes."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN = "run the same command again: finished stages are kept"


class Terminated(BaseException):
    """This process was asked to end.

    Attributes:
        exit_code: As a shell has it.
    """

    def __init__(self, number: int) -> None:
        """Name the signal."""
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def ends_on_request() -> Iterator[None]:
    """Raise Terminated in the block when the process is asked to end, once.

    What was ignored before, as nohup does with SIGHUP, stays ignored. Outside the main thread
    nothing changes, for signals are not seen there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.getsignal(number)

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:  # the end is not to be cut off
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
