"""The machine that a speed was measured on."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from quantline.files import MIB

# From when on a machine counts as busy. A runtime waits for the slowest of its threads, so that
# little is enough.
MOST_STEAL = 0.02  # of the processors' time, taken by other guests of the host
MOST_TAKEN = 0.05  # of the runtime's threads, taken by other processes
MOST_LOAD = 1.5  # processes a core that want to run, in the minute before


class Processors(NamedTuple):
    """What the processors that this process may use have done until a moment, in seconds.

    Attributes:
        now: The moment.
        used: By all processes.
        stolen: By other guests of the host.
        own: By this process.
    """

    now: float
    used: float
    stolen: float
    own: float


def read_processors() -> Processors:
    """Return what the processors have done until now."""
    allowed = os.sched_getaffinity(0)
    times = [entry for index, entry in enumerate(psutil.cpu_times(percpu=True)) if index in allowed]
    used = sum(
        entry.user + entry.nice + entry.system + entry.irq + entry.softirq for entry in times
    )
    own = os.times()
    return Processors(
        time.monotonic(), used, sum(entry.steal for entry in times), own.user + own.system
    )


def other_work(
    before: Processors, after: Processors, threads: int, load_average: float
) -> dict[str, Any]:
    """Return what else ran between two moments, and whether it made a speed too low.

    Args:
        before: When the measurement began.
        after: When it ended.
        threads: Of the runtime.
        load_average: Of the minute before.

    Returns:
        {load_average, other_cores, steal_share, busy}. `other_cores` is how many cores other
        processes used, `steal_share` the share of the processors' time that other guests of the
        host took, and `busy` has a reason for each of them that is large enough to matter.
    """
    cores = len(os.sched_getaffinity(0))
    seconds = max(after.now - before.now, 1e-9)
    others = max(0.0, (after.used - before.used) - (after.own - before.own)) / seconds
    stolen = max(0.0, after.stolen - before.stolen) / (seconds * cores)
    taken = max(0.0, others - max(0, cores - threads)) / max(threads, 1)
    reasons = []
    if not taken <= MOST_TAKEN:
        reasons.append(f"other processes used {others:.1f} of {cores} cores")
    if not stolen <= MOST_STEAL:
        reasons.append(f"other guests of the host took {stolen:.0%} of the processors' time")
    if not load_average <= MOST_LOAD * cores:
        reasons.append(f"the load average was {load_average:.1f} on {cores} cores")
    return {
        "load_average": load_average,
        "other_cores": round(others, 3),
        "steal_share": round(stolen, 4),
        "busy": reasons,
    }


def describe_machine() -> dict[str, Any]:
    """Return {cpu, cores, memory_mib, gpus, system, python}.

    `cores` are those that this process may use.
    """
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": psutil.virtual_memory().total // MIB,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu() -> str:
    """Return the processor's name as the kernel gives it, or else its architecture."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine()


def _gpus() -> list[str]:
    """Return names of the GPUs, if this process has torch.

    A runtime without torch is measured on the CPU.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
