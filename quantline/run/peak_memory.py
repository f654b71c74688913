"""How much memory processes have taken at most."""

import resource
from pathlib import Path


def peak_memory_mib() -> float:
    """Return the peak of this process's resident memory in MiB, pages of mapped files included.

    Not getrusage's: that starts from the peak of the process that started this one.

    Raises:
        RuntimeError: If the kernel does not tell it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("expected VmHWM in /proc/self/status, found none; the figures need Linux")


def peak_of_processes_mib() -> float:
    """Return the same of the largest process among this one and those it has waited for.

    A process that was started begins with the size of this one, which is counted anyway.
    """
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return max(peak_memory_mib(), started)
