"""Ending a process with all that it has started."""

import contextlib
import subprocess
import time

import psutil

from quantline.run.leash import is_running

TIDY_S = 30.0  # that stages have to end
POLL_S = 0.05  # between two looks whether they have


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it has started; stages get the time to tidy up."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # first, so that DVC starts nothing more
    process.wait()
    for member in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    deadline = time.monotonic() + TIDY_S
    while time.monotonic() < deadline and any(is_running(member) for member in started):
        time.sleep(POLL_S)
    for member in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
