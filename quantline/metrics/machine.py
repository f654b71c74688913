"""The machine that a speed was measured on."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from quantline.files import MIB


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
