"""The machine that a speed is measured on."""

import math
import subprocess
import sys
import time

import pytest

from quantline.metrics.machine import (
    Processors,
    describe_machine,
    other_work,
    read_processors,
)


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
        "from quantline.run.peak_memory import peak_memory_mib\n"
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


def processors(now: float, used: float, own: float, stolen: float = 0.0) -> Processors:
    return Processors(now, used, stolen, own)


@pytest.mark.parametrize(
    ("after", "threads", "load", "reasons"),
    [
        (processors(10, 20, 20), 2, 1.0, []),
        (processors(10, 20.9, 20), 2, 1.0, []),
        (processors(10, 25, 20), 2, 1.0, ["other processes used 0.5 of 2 cores"]),
        (processors(10, 15, 9), 1, 1.0, []),  # the others had a core of their own
        (processors(10, 22, 8), 1, 1.0, ["other processes used 1.4 of 2 cores"]),
        (
            processors(10, 18, 18, 2),
            2,
            1.0,
            ["other guests of the host took 10% of the processors' time"],
        ),
        (processors(10, 20, 20), 2, 9.0, ["the load average was 9.0 on 2 cores"]),
        (processors(10, 20, 20), 2, math.nan, ["the load average was nan on 2 cores"]),
    ],
)
def test_other_work_says_what_made_a_speed_too_low(monkeypatch, after, threads, load, reasons):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    found = other_work(processors(0, 0, 0), after, threads, load)
    assert found["busy"] == reasons


def test_read_processors_sees_this_process_and_others():
    before = read_processors()
    finish = time.monotonic() + 0.3
    while time.monotonic() < finish:
        pass
    after = read_processors()
    assert 0.05 < after.own - before.own < 5
    assert after.used >= before.used > 0
