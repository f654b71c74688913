"""A process that logs to MLflow what stages have kept, while they go on.

A stage needs one to two seconds to import MLflow and to open its store, and a tenth of that to log
its run. Where many stages run, they keep their runs (quantline/tracking/undelivered.py), and one
process that has MLflow open takes them from there.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from quantline.config.compose import load_params
from quantline.config.tracking import Tracking
from quantline.errors import ConfigError
from quantline.messages import say
from quantline.run.leash import end_with_parent, is_running
from quantline.run.process_tree import end_tree
from quantline.tracking.store import TrackingError
from quantline.tracking.undelivered import deliver, waiting

DELIVERER = "QUANTLINE_DELIVERER"  # in the environment of all that runs inside: its process
POLL_S = 0.2
INTERRUPTED_S = 15.0  # that remain for the runs of what an interrupt has ended
PARAMS = Path("params.yaml")


@contextmanager
def delivering() -> Iterator[None]:
    """Have the runs of stages that are started inside logged by another process.

    At the end all of them are logged, or it has been said which wait.
    """
    parent = os.getpid()

    def begin() -> None:
        end_with_parent(parent)
        # Ctrl-C goes to the whole group, and the stages that it ends have failed runs to log.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-m", "quantline.run.deliverer"],
        stdin=subprocess.PIPE,
        preexec_fn=begin,  # noqa: PLW1509  the commands have one thread
    )
    assert process.stdin is not None
    os.environ[DELIVERER] = str(process.pid)
    try:
        yield
        process.stdin.close()
        code = process.wait()
        if code < 0:
            _say_kept(f"what logs was ended by signal {-code}")
    except BaseException:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPTED_S)
        raise
    finally:
        os.environ.pop(DELIVERER, None)
        end_tree(process)


def has_deliverer() -> bool:
    """Whether a process logs what this one keeps."""
    pid = os.environ.get(DELIVERER, "")
    try:
        return pid.isdecimal() and is_running(psutil.Process(int(pid)))
    except psutil.NoSuchProcess:
        return False


def deliver_until(ended: int, tracking: Tracking) -> None:
    """Deliver what is kept, as soon as it is, until nobody keeps more.

    Args:
        ended: A file descriptor, from which can be read once nobody does.
        tracking: Where to.

    Raises:
        TrackingError: If the store takes nothing at all now.
    """
    refused: set[str] = set()  # is not tried again and again
    goes_on = True
    while goes_on:
        goes_on = not select.select([ended], [], [], POLL_S)[0]
        while new := set(waiting()) - refused:
            error = deliver(tracking).error
            refused |= new & set(waiting())  # others have come meanwhile
            if error is not None:
                _say_kept(error)


def _say_kept(error: object) -> None:
    say(
        f"MLflow does not have all that stages have made: {error}; it is kept, `quantline track` "
        "delivers it",
        error=True,
    )


def main() -> None:
    """Deliver what the stages of the project of the working folder keep."""
    try:
        deliver_until(sys.stdin.fileno(), load_params(PARAMS).tracking)
    except (TrackingError, ConfigError, OSError) as error:
        _say_kept(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
