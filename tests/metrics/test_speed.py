"""Speed: what is timed, what is dropped, and the figures that are made of it."""

import time

import numpy as np
import pytest

from quantline.config.texts import Speed
from quantline.errors import Failure, StageError
from quantline.metrics.speed import check_speed, measure_speed


class TimedRuntime:
    """A runtime on a clock of its own: each call takes the next of `seconds`."""

    device = "cpu"

    def __init__(self, monkeypatch, seconds: list[float]) -> None:
        self.now = 0.0
        self.seconds = iter(seconds)
        self.calls = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def generate(self, prompt, max_new_tokens, stop):
        self.calls.append((len(prompt), max_new_tokens, stop))
        self.now += next(self.seconds)


def test_measure_speed_takes_median_and_quartiles_after_the_warm_up(monkeypatch):
    runtime = TimedRuntime(monkeypatch, [100, 100, 2, 4, 1, 8, 4, 2, 5, 1, 10, 20])
    settings = Speed(prompt_tokens=20, new_tokens=16, repetitions=5, threads=3)
    speed = measure_speed(runtime, settings, load_s=1.5)
    warm_up = [(20, 1, set()), (1, 8, set())]
    assert runtime.calls == warm_up + [(20, 1, set()), (1, 16, set())] * 5
    expected = {"prefill": [10, 20, 5, 4, 2], "decode": [4, 2, 8, 16, 0.8]}
    for name, rates in expected.items():
        assert speed[f"{name}_tok_s"] == pytest.approx(np.median(rates))
        assert speed[f"{name}_iqr"] == pytest.approx(np.percentile(rates, [25, 75]))
        assert speed[f"{name}_spread"] == [min(rates), max(rates)]
    settings_used = {
        "load_s": 1.5,
        "batch": 1,
        "prompt_tokens": 20,
        "new_tokens": 16,
        "repetitions": 5,
        "threads": 3,
        "device": "cpu",
    }
    assert settings_used.items() <= speed.items()
    assert {"peak_rss_mib", "load_average", "machine"} <= set(speed)


@pytest.mark.parametrize(
    ("seconds", "repetitions"), [(None, 5), (1000, 5), (20, 4), (13, 3), (1, 3)]
)
def test_measure_speed_ends_after_three_repetitions_that_take_long(
    monkeypatch, seconds, repetitions
):
    runtime = TimedRuntime(monkeypatch, [1, 1] + [2, 3] * 5)
    settings = Speed(prompt_tokens=20, new_tokens=16, repetitions=5, seconds=seconds)
    speed = measure_speed(runtime, settings, load_s=0)
    assert speed["repetitions"] == repetitions
    assert len(runtime.calls) == 2 + 2 * repetitions


def test_check_speed_refuses_lengths_beyond_learned_positions():
    settings = Speed(prompt_tokens=128, new_tokens=64, repetitions=1)
    check_speed(settings, None)
    check_speed(settings, 129)
    with pytest.raises(
        StageError, match=r"64 positions, found .*prompt_tokens=128 and .*=64"
    ) as error:
        check_speed(settings, 64)
    assert error.value.failure == Failure.CONFIG_INVALID
