"""Speed: what is timed, what is dropped, and the figures that are made of it."""

import subprocess
import sys
import time

import numpy as np
import pytest

from quantline.config.params import Speed
from quantline.metrics import machine, speed


class Timed:
    """A runtime whose clock is told: each call takes the next of `seconds`."""

    device = "cpu"

    def __init__(self, monkeypatch, seconds: list[float]) -> None:
        self.now, self.seconds, self.calls = 0.0, iter(seconds), []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def generate(self, prompt, max_new_tokens, stop):
        self.calls.append((len(prompt), max_new_tokens, stop))
        self.now += next(self.seconds)


def test_median_and_quartiles_over_the_repetitions_after_the_warm_up(monkeypatch):
    runtime = Timed(monkeypatch, [100, 100, 2, 4, 1, 8, 4, 2, 5, 1, 10, 20])
    found = speed.measure(runtime, Speed(prompt_tokens=20, new_tokens=8, repetitions=5, threads=3), load_s=1.5)
    assert runtime.calls == [(20, 1, set()), (1, 8, set())] * 6
    prefill, decode = [10, 20, 5, 4, 2], [2, 1, 4, 8, 0.4]
    for name, rates in (("prefill", prefill), ("decode", decode)):
        assert found[f"{name}_tok_s"] == pytest.approx(np.median(rates))
        assert found[f"{name}_iqr"] == pytest.approx(np.percentile(rates, [25, 75]))
        assert found[f"{name}_spread"] == [min(rates), max(rates)]
    said = {key: found[key] for key in ("load_s", "batch", "prompt_tokens", "new_tokens", "repetitions", "threads", "device")}
    assert said == {"load_s": 1.5, "batch": 1, "prompt_tokens": 20, "new_tokens": 8, "repetitions": 5, "threads": 3, "device": "cpu"}


def test_the_machine_is_described():
    found = machine.describe()
    assert set(found) == {"cpu", "cores", "memory_mib", "gpus", "system", "python"}
    assert found["cpu"] and found["cores"] >= 1 and found["memory_mib"] > 100 and found["system"].startswith("Linux")


def test_the_peak_is_that_of_this_process_alone():
    """getrusage would tell this process's peak, which is larger than that of the one it starts."""
    held = bytearray(300 << 20)
    code = "from quantline.metrics import machine; a = machine.peak_mib(); held = bytearray(64 << 20); held = None; print(a, machine.peak_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert len(held) and before < 200 and 60 < after - before < 80
