"""Processes that end with the one that started them, however that ends.

A process that is killed can take nothing with it, so the one that it started has to ask the system
for a signal beforehand, and to look whether its parent is gone already.
"""

import ctypes
import os
import signal
from collections.abc import Callable

import psutil

PR_SET_PDEATHSIG = 1  # of prctl: the signal that this process gets when its parent ends
_prctl = ctypes.CDLL(None).prctl  # loaded here: between fork and exec nothing may be


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the system end this process when its parent ends.

    Args:
        parent: Its id, as the parent itself says it: it may have ended before this call.
        by: The signal.
    """
    _prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent and not is_alive(parent):
        os._exit(128 + by)


def is_alive(pid: int) -> bool:
    """Whether there is a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_running(process: psutil.Process) -> bool:
    """Whether a process has not ended; one whose end nobody has asked for yet has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leashed() -> Callable[[], None]:
    """Return what Popen calls in the new process (`preexec_fn`) so that it ends with this one."""
    parent = os.getpid()
    return lambda: end_with_parent(parent)


def call_with_children(call: Callable[[], None]) -> None:
    """Call a function in a child of this process, and end as that ends.

    When the parent of this process ends, all processes of its group end with it: a process that is
    killed takes nothing with it, but this one is there to do it.
    """
    parent = os.getpid()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(parent)
        call()
        return
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _end_by(-code)
    os._exit(code)


def _end_by(number: int) -> None:
    """End by the signal that ended the child, so that the one who waits sees it."""
    import faulthandler
    import resource

    faulthandler.disable()  # the child has said it already
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_group(*_: object) -> None:
    """End all processes of this one's group, itself included: a handler of signals."""
    os.killpg(0, signal.SIGKILL)
