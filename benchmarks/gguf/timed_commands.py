"""Commands that are timed, and the disk that they fill."""

import os
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from quantline.files import MIB

POLL_SECONDS = 0.1


def folder_size(folder: Path) -> int:
    """Return the bytes of the files in a folder in which others are writing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


class DiskWatch(threading.Thread):
    """Watches a folder while something runs.

    Attributes:
        peak: The largest size seen, in bytes.
    """

    def __init__(self, folder: Path) -> None:
        """Watch a folder from `start` on."""
        super().__init__(daemon=True)
        self.folder = folder
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        """Look at the folder again and again."""
        while not self._ended.wait(POLL_SECONDS):
            self.peak = max(self.peak, folder_size(self.folder))

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join()


def children_cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_timed(folder: Path, *commands: list[str]) -> dict[str, Any]:
    """Run commands one after another.

    Args:
        folder: Where they write; it is emptied first.
        commands: To run.

    Returns:
        {seconds, cpu_seconds, written_mib: what the folder holds at the end, peak_disk_mib: the
        most that it held, steps: the seconds of each command}.

    Raises:
        SystemExit: If one fails.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    watch = DiskWatch(folder)
    cpu_before = children_cpu_seconds()
    steps = []
    watch.start()
    for command in commands:
        started = time.perf_counter()
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            raise SystemExit(f"{command} ended with {process.returncode}: {process.stderr[-3000:]}")
        steps.append(time.perf_counter() - started)
    cpu_seconds = children_cpu_seconds() - cpu_before
    watch.stop()
    size = folder_size(folder)
    return {
        "seconds": sum(steps),
        "cpu_seconds": cpu_seconds,
        "written_mib": size / MIB,
        "peak_disk_mib": max(watch.peak, size) / MIB,
        "steps": steps,
    }
