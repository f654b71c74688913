"""A worker: it does items of a queue until there is none left.

python -m quantline.executor.worker QUEUE NAME [PARENT]

With the id of the process that started it, on the same machine, it ends with that. On other
machines Ray or Slurm ends it.
"""

import contextlib
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

from quantline.errors import Failure, StageError
from quantline.executor.item import Item
from quantline.executor.queue import Queue
from quantline.messages import say
from quantline.run.answers import failure_answer
from quantline.run.leash import end_with_parent


def work(folder: str, name: str) -> None:
    """Do items of a queue until there is none left.

    Args:
        folder: The session's.
        name: Of this worker, as the queue knows it.
    """
    if not Path(folder).is_dir():  # the stage ended before this worker began
        return
    queue = Queue(Path(folder))
    os.chdir(queue.project)
    while item := queue.claim(name):
        _do(queue, item, name)


def _do(queue: Queue, item: Item, name: str) -> None:
    made = None
    try:
        made = queue.work_folder(item.id, name)
        _check_gpus(queue.gpus)
        item.perform(made)
        queue.finish(item.id, made)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        if not isinstance(error, StageError):
            say("".join(traceback.format_exception(error)), error=True)
        queue.fail(item.id, failure_answer(error))
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _check_gpus(wanted: int) -> None:
    """Check that this worker has the GPUs that it was promised.

    Raises:
        StageError: config_invalid; on a CPU the bits would be others.
    """
    if not wanted:
        return
    import torch

    if torch.cuda.device_count() < wanted:
        raise StageError(
            Failure.CONFIG_INVALID,
            f"expected {wanted} GPUs for a worker on {socket.gethostname()}, found "
            f"{torch.cuda.device_count()}; lower executor.workers or executor.gpus",
        )


def main(arguments: list[str]) -> None:
    """Run as a process of its own."""
    folder, name, *parent = arguments
    if parent:
        end_with_parent(int(parent[0]))
        with contextlib.suppress(OSError):
            # Where the system runs out of memory, this process goes and not another.
            Path("/proc/self/oom_score_adj").write_text("1000")
    work(folder, name)


if __name__ == "__main__":
    main(sys.argv[1:])
