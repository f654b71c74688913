"""Workers that are jobs of Slurm, by submitit. Only a command goes through it."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from quantline.config.executor import Executor
from quantline.errors import Failure, StageError
from quantline.executor.queue import Queue
from quantline.executor.workers import Ended, settings_of

STOP_S = 20.0  # to wait for jobs that were cancelled
LONGEST = 300  # characters of what submitit says in a message
MIB_OF_GB = 1024


class SlurmWorker:
    """One job."""

    def __init__(self, job: Any) -> None:
        """Watch a job of submitit."""
        self.job = job

    def ended(self) -> Ended | None:
        """Return how it has ended; None while it works or waits for its machine."""
        if not self.job.done():
            return None
        error = self.job.exception()
        if error is None:
            return Ended(True, "well")
        text = " ".join(str(error).split())
        return Ended(False, f"job {self.job.job_id} ({self.job.state}): {text[-LONGEST:]}")


class SlurmWorkers:
    """Submits jobs.

    Attributes:
        poll_s: Between two looks at them.
    """

    poll_s = 0.5

    def __init__(self, submitit: Any, executor: Executor, queue: Queue) -> None:
        """Say what a job needs.

        Raises:
            StageError: runtime_unavailable, where there is no Slurm.
        """
        self._queue = queue
        self._command_function = submitit.helpers.CommandFunction
        threads = executor.threads or 1
        settings = settings_of(threads, executor.gpus)
        self._command = ["env", *(f"{name}={value}" for name, value in settings.items())]
        self._command += [sys.executable, "-X", "faulthandler", "-m", "quantline.executor.worker"]
        try:
            self._executor = submitit.AutoExecutor(
                folder=str(queue.folder / "logs" / "jobs"), cluster=executor.cluster
            )
        except RuntimeError as error:
            raise StageError(
                Failure.RUNTIME_UNAVAILABLE,
                f"expected Slurm on this machine, and submitit finds none: {error}; run quantline "
                "where srun and sbatch are, or try executor.cluster=local",
            ) from error
        parameters: dict[str, Any] = {
            "name": "quantline",
            "timeout_min": executor.minutes,
            "cpus_per_task": threads,
            "slurm_additional_parameters": dict(executor.sbatch),
        }
        if executor.gpus:
            parameters["gpus_per_node"] = executor.gpus
        if executor.memory_mib:
            parameters["mem_gb"] = executor.memory_mib / MIB_OF_GB
        self._executor.update_parameters(**parameters)
        self._started: list[SlurmWorker] = []

    def start(self, name: str, place: int) -> SlurmWorker:
        """Submit a job."""
        command = [*self._command, str(self._queue.folder), name]
        function = self._command_function(command, verbose=False, cwd=self._queue.project)
        worker = SlurmWorker(self._executor.submit(function))
        self._started.append(worker)
        return worker

    def stop(self) -> None:
        """Cancel all jobs, and wait a while for their end."""
        running = [worker for worker in self._started if not worker.job.done()]
        for worker in running:
            worker.job.cancel(check=False)
        until = time.monotonic() + STOP_S
        while time.monotonic() < until and any(not worker.job.done() for worker in running):
            time.sleep(self.poll_s)


@contextlib.contextmanager
def slurm_workers(executor: Executor, queue: Queue) -> Iterator[SlurmWorkers]:
    """Submit jobs in the block, and cancel with it what still runs.

    Raises:
        StageError: runtime_unavailable, if submitit is not installed, or there is no Slurm.
    """
    try:
        import submitit
    except ImportError as error:
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            f"expected submitit for executor slurm, and cannot import it: {error}; install it: "
            "pip install 'quantline[slurm]'",
        ) from error
    workers = SlurmWorkers(submitit, executor, queue)
    try:
        yield workers
    finally:
        workers.stop()
