"""The machine that a speed is measured on."""

import subprocess
import sys

from quantline.metrics.machine import describe_machine


def test_describe_machine_names_what_a_speed_depends_on():
    machine = describe_machine()
    assert set(machine) == {"cpu", "cores", "memory_mib", "gpus", "system", "python"}
    assert machine["cpu"] and machine["cores"] >= 1
    assert machine["memory_mib"] > 100
    assert machine["system"].startswith("Linux")


def test_peak_memory_mib_is_that_of_this_process_alone():
    """getrusage would give this process's peak, which is larger than that of its child."""
    held = bytearray(300 << 20)
    code = (
        "from quantline.metrics.machine import peak_memory_mib\n"
        "before = peak_memory_mib()\n"
        "held = bytearray(64 << 20)\n"
        "held = None\n"
        "print(before, peak_memory_mib())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = (float(number) for number in done.stdout.split())
    assert len(held) == 300 << 20
    assert before < 200
    assert 60 < after - before < 80
